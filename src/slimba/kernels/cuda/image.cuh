// How vectors lie in float16 for the products of broad.cu: which column is in which place.
//
// 64 places of all vectors lie after 64 places, a vector's 128 bytes in the swizzle of warpgroup.cuh. Of 256 columns, lane t
// of four has the 64 from 64 t on, two words of signs h; bits 2 jj + odd and 16 above are a pair of halves of the left
// operand of step 8 h + jj.
#define IMAGE_SCALE 0.0625f  // of vectors that steps.cu leaves, which are not divided by their RMS yet

DEV int image_column(int eight, int i) {  // the column of place 8 eight + i
  const int step = eight / 2, t = i / 2, high = i % 2;
  return (step & ~15) * 16 + 64 * t + (step >> 3 & 1) * 32 + 16 * high + (step & 7) * 2 + (eight & 1);
}
// Eights of places of vector v in an image of `padded` vectors.
DEV u8* image_at(i64 image, int padded, int v, int eight) {
  return (u8*)image + ((i64)(eight >> 3) * padded + v) * 128 + (((eight & 7) ^ (v & 7)) << 4);
}

// How vectors lie in float16 for the products of broad.cu, and where columns go as operands of eight.cuh.
//
// For broad.cu, 64 places of all vectors lie after 64 places, a vector's 128 bytes in the swizzle of warpgroup.cuh. Of 256 columns, lane t
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

// Where a column goes as an operand of eight.cuh, and what multiplies it there: its place among the first vector's in bytes, and
// that in the second plane, or -1.
struct Place {
  i32 at, at2;
  float by, by2;
};
DEV Place load_place(i64 places, int column) {
  const uint4 v = *(const uint4*)(places + 16 * (i64)column);
  return {(i32)v.x, (i32)v.y, bits_to_float(v.z), bits_to_float(v.w)};
}
DEV void put_operand(i64 x, i64 x2, const Place& place, int b, float v) {
  *(u16*)(x + place.at + 64 * b) = float_to_half_bits(v * place.by);
  if (place.at2 >= 0) *(u16*)(x2 + place.at2 + 64 * b) = float_to_half_bits(v * place.by2);
}

// See sampler.h. Float64 from the penalty on; only as much of the vocabulary is sorted as the draw needs.
#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace slimba {

double uniform(std::uint64_t seed, std::uint64_t b, std::uint64_t i) {
  std::uint64_t z = seed + 0x9E3779B97F4A7C15u * (1 + i + (b << 32));
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  z ^= z >> 31;
  return double(z >> 11) * 0x1p-53;
}

void Sampler::sort_front(std::size_t from, std::size_t count) {
  const auto before = [this](std::int32_t l, std::int32_t r) {
    const double a = logit_[std::size_t(l)], b = logit_[std::size_t(r)];
    return a > b || (a == b && l < r);
  };
  const auto begin = order_.begin() + std::ptrdiff_t(from), end = begin + std::ptrdiff_t(count);
  if (end != order_.end()) std::nth_element(begin, end, order_.end(), before);
  std::sort(begin, end, before);
}

std::int32_t Sampler::sample(const float* logits, std::int64_t vocab, const std::uint8_t* seen, const SampleParams& p,
                             std::uint64_t b, std::uint64_t i) {
  const std::size_t n = std::size_t(p.n_valid > 0 ? std::min(p.n_valid, vocab) : vocab);
  logit_.resize(n);
  std::size_t best = 0;
  for (std::size_t id = 0; id < n; ++id) {
    double v = double(logits[id]);
    if (!std::isfinite(v)) {
      throw std::domain_error("the logits of sequence " + std::to_string(b) + " hold NaN or infinity at id " +
                              std::to_string(id) + " (new token " + std::to_string(i) +
                              "): the weights are damaged or the state has overflowed");
    }
    if (seen[id]) v = v > 0 ? v / p.repetition_penalty : v * p.repetition_penalty;
    logit_[id] = v;
    if (v > logit_[best]) best = id;
  }
  if (p.temperature == 0) return std::int32_t(best);

  const double top = logit_[best] / p.temperature;
  weight_.resize(n);
  order_.resize(n);
  double total = 0;
  for (std::size_t id = 0; id < n; ++id) {
    logit_[id] /= p.temperature;
    weight_[id] = std::exp(logit_[id] - top);
    total += weight_[id];
    order_[id] = std::int32_t(id);
  }

  // kept: how many ranks survive; sorted: how many ranks are in place.
  std::size_t kept = n, sorted = 0;
  const auto rank = [&](std::size_t r) {
    while (r >= sorted) {
      const std::size_t more = std::min(n - sorted, std::max<std::size_t>(64, sorted * 3));
      sort_front(sorted, more);
      sorted += more;
    }
    return weight_[std::size_t(order_[r])];
  };
  const auto sum_of_kept = [&] {
    double sum = 0;
    for (std::size_t r = 0; r < kept; ++r) sum += rank(r);
    return sum;
  };
  if (p.top_k > 0 && std::size_t(p.top_k) < n) {
    kept = std::size_t(p.top_k);
    total = sum_of_kept();
  }
  if (p.top_p < 1) {
    double sum = 0;
    std::size_t r = 0;
    while (r < kept && sum < p.top_p * total) sum += rank(r++);
    kept = std::max<std::size_t>(1, r);
    total = sum;
  }
  if (p.min_p > 0) {
    std::size_t r = 0;
    while (r < kept && rank(r) >= p.min_p * weight_[best]) ++r;
    kept = std::max<std::size_t>(1, r);
    total = sum_of_kept();
  }
  const double target = uniform(p.seed, b, i) * total;
  double sum = 0;
  for (std::size_t r = 0; r < kept; ++r) {
    sum += rank(r);
    if (sum > target) return order_[r];
  }
  return order_[kept - 1];
}

}  // namespace slimba

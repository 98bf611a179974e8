// The instructions of csrc/cuda/ptx.cuh: the exact result rounded, moved by the worst error that the PTX ISA documents
// where the environment's EMULATED_ERROR says so: "exact" (as if unset), "up", "down", or "mixed", by the argument's
// bits.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>

namespace fastprob::ptx {

enum class Error { exact, up, down, mixed };

inline Error chosen_error() {
  const char* given = std::getenv("EMULATED_ERROR");
  const std::string name = given ? given : "exact";
  if (name == "exact") return Error::exact;
  if (name == "up") return Error::up;
  if (name == "down") return Error::down;
  if (name == "mixed") return Error::mixed;
  throw std::invalid_argument("EMULATED_ERROR must be exact, up, down or mixed, got " + name);
}

// Which way the result for x is moved: 1, -1 or 0.
inline int direction(float x) {
  static const Error error = chosen_error();
  if (error != Error::mixed) return error == Error::up ? 1 : error == Error::down ? -1 : 0;
  uint32_t bits = std::bit_cast<uint32_t>(x) * 2654435761u;
  bits = (bits ^ bits >> 15) * 2246822519u;
  return static_cast<int>((bits ^ bits >> 13) % 3) - 1;
}

inline float flush(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.f, x) : x; }

inline float move(float x, int ulps) {
  const float towards = ulps > 0 ? INFINITY : -INFINITY;
  for (int i = 0; i < std::abs(ulps); ++i) x = std::nextafter(x, towards);
  return flush(x);
}

inline float mul_ftz(float x, float y) { return flush(flush(x) * flush(y)); }

// Within 1 ulp.
inline float rcp_approx_ftz(float x) {
  const float result = 1 / flush(x);
  return std::isfinite(result) && flush(result) != 0 ? move(result, direction(x)) : flush(result);
}

// Within 2^-23, relative.
inline float sqrt_approx_ftz(float x) {
  const float result = std::sqrt(flush(x));
  return result > 0 ? move(result, direction(x)) : result;
}

// Within 2^-22, absolute in (1/2, 2) and else relative.
inline float lg2_approx_ftz(float x) {
  const double result = std::log2(static_cast<double>(flush(x)));
  if (!std::isfinite(result)) return static_cast<float>(result);
  const double scale = x > 0.5f && x < 2 ? 1 : std::fabs(result);
  return static_cast<float>(result + direction(x) * 0x1p-22 * scale);
}

// Within 2 ulp.
inline float ex2_approx_ftz(float x) {
  const float result = static_cast<float>(std::exp2(static_cast<double>(flush(x))));
  return std::isfinite(result) && flush(result) != 0 ? move(result, 2 * direction(x)) : flush(result);
}

}  // namespace fastprob::ptx

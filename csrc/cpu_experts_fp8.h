// fp8 to bfloat16, which is always exact: 64 codes at a time. For the files compiled for CPUs with AVX-512 alone.
#pragma once
#include <immintrin.h>

#include "cpu_experts_kernels.h"

namespace expertd::cpu_experts {

// The bytes of the bfloat16 value of each e4m3 code, without its sign.
struct Table {
  alignas(64) uint8_t low[128];
  alignas(64) uint8_t high[128];
};

constexpr Table make_table() {
  Table table{};
  for (int code = 0; code < 128; ++code) {
    int exponent = code >> 3, mantissa = code & 7;
    int bits = 0;
    if (code == 0x7F) {
      bits = 0x7FC0;  // NaN
    } else if (exponent > 0) {
      bits = (exponent - 7 + 127) << 7 | mantissa << 4;
    } else if (mantissa > 0) {  // subnormal here, normal in bfloat16
      exponent = 1;
      while (mantissa < 8) {
        mantissa <<= 1;
        --exponent;
      }
      bits = (exponent - 7 + 127) << 7 | (mantissa & 7) << 4;
    }
    table.low[code] = static_cast<uint8_t>(bits & 0xFF);
    table.high[code] = static_cast<uint8_t>(bits >> 8);
  }
  return table;
}

inline constexpr Table kTable = make_table();

constexpr int kAheadBytes = 16 * kStepBytes;

// Turns 64 codes into 2 x 32 bfloat16: of each quarter of 16 codes, the first 8 and the last 8.
class Expander {
 public:
  Expander()
      : low_first_(_mm512_load_si512(kTable.low)),
        low_last_(_mm512_load_si512(kTable.low + 64)),
        high_first_(_mm512_load_si512(kTable.high)),
        high_last_(_mm512_load_si512(kTable.high + 64)),
        sign_(_mm512_set1_epi8(static_cast<char>(0x80))) {}

  void expand(__m512i codes, __m512i& first, __m512i& last) const {
    const __m512i low = _mm512_permutex2var_epi8(low_first_, codes, low_last_);
    __m512i high = _mm512_permutex2var_epi8(high_first_, codes, high_last_);
    high = _mm512_ternarylogic_epi32(high, codes, sign_, 0xF8);  // high | (codes & sign)
    first = _mm512_unpacklo_epi8(low, high);
    last = _mm512_unpackhi_epi8(low, high);
  }

  // A group of packed weights into two rows of its tile. NOTE: the hardware reads ahead within a page of 4 KiB only.
  void expand_ahead(const uint8_t* packed, __m512i& first, __m512i& last) const {
    _mm_prefetch(reinterpret_cast<const char*>(packed + kAheadBytes), _MM_HINT_T1);
    expand(_mm512_load_si512(packed), first, last);
  }

 private:
  __m512i low_first_, low_last_, high_first_, high_last_, sign_;
};

}  // namespace expertd::cpu_experts

// What is done around the products: gather before them, activation and sum after them. By AVX-512, whichever unit
// multiplies.
#include "cpu_experts_kernels.h"

#include <immintrin.h>

#include "cpu_experts_fp8.h"

namespace expertd::cpu_experts {
namespace {

// scratch.sums of all rows times one block.
void multiply_block(Unit unit, const Rows& rows, const uint8_t* packed, Scratch& scratch) {
  switch (unit) {
    case Unit::kAmx:
      return multiply_block_with_amx(rows, packed, scratch);
    case Unit::kAvx512:
      return multiply_block_with_avx512(rows, packed, scratch);
  }
}

// ---- Activation ----

// min and max of x86 return their second operand where one is NaN: so these keep NaN.
inline __m512 at_most(__m512 x, float limit) { return _mm512_min_ps(_mm512_set1_ps(limit), x); }
inline __m512 at_least(__m512 x, float limit) { return _mm512_max_ps(_mm512_set1_ps(limit), x); }

inline __m512 times_add(__m512 x, __m512 y, float z) { return _mm512_fmadd_ps(x, y, _mm512_set1_ps(z)); }

// e to the power of x, within 2 units in the last place; 0 below -104, infinite above 89.
inline __m512 exponential(__m512 x) {
  x = at_least(at_most(x, 89.0f), -104.0f);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);  // ln 2, in two parts
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = times_add(p, r, 1.3981999507e-3f);
  p = times_add(p, r, 8.3334519073e-3f);
  p = times_add(p, r, 4.1665795894e-2f);
  p = times_add(p, r, 1.6666665459e-1f);
  p = times_add(p, r, 5.0000001201e-1f);
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r);
  return _mm512_scalef_ps(_mm512_add_ps(p, _mm512_set1_ps(1.0f)), n);
}

inline __m512 sigmoid_times(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(x, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// x * Phi(x). Phi(-|x|) = erfc(z) / 2 with z = |x| / sqrt(2), and (1 + 2 z) exp(z^2) erfc(z) is a polynomial of
// (z - 2) / (z + 2). So the result is accurate far below zero too, where 1 + erf would cancel.
inline __m512 gelu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 z = at_most(_mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.707106781f)), 15.0f);
  const __m512 two = _mm512_set1_ps(2.0f);
  const __m512 q = _mm512_div_ps(_mm512_sub_ps(z, two), _mm512_add_ps(z, two));
  __m512 p = _mm512_set1_ps(-4.01020574e-4f);
  p = times_add(p, q, -1.23073824e-3f);
  p = times_add(p, q, 1.31355994e-3f);
  p = times_add(p, q, 8.63243826e-3f);
  p = times_add(p, q, -8.05991236e-3f);
  p = times_add(p, q, -5.42047396e-2f);
  p = times_add(p, q, 1.64055347e-1f);
  p = times_add(p, q, -1.66031361e-1f);
  p = times_add(p, q, -9.27639678e-2f);
  p = times_add(p, q, 2.76978403e-1f);
  const __m512 square = _mm512_mul_ps(z, z);
  const __m512 lost = _mm512_fmsub_ps(z, z, square);  // by rounding the square
  __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), square));
  e = _mm512_fnmadd_ps(e, lost, e);
  const __m512 erfc = _mm512_mul_ps(_mm512_div_ps(_mm512_add_ps(p, one), _mm512_fmadd_ps(two, z, one)), e);
  const __m512 tail = _mm512_mul_ps(erfc, _mm512_set1_ps(0.5f));
  const __mmask16 is_positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
  return _mm512_mul_ps(x, _mm512_mask_sub_ps(tail, is_positive, one, tail));
}

template <Activation kActivation>
inline __m512 activate(__m512 x) {
  switch (kActivation) {
    case Activation::kSwiglu:
      return sigmoid_times(x);
    case Activation::kGelu:
    case Activation::kGeglu:
      return gelu(x);
    case Activation::kRelu2:
      x = at_least(x, 0.0f);
      return _mm512_mul_ps(x, x);
    case Activation::kIdentity:
      break;
  }
  return x;
}

// The fp8 value next to x, to even from the middle, at most 448, as bfloat16; NaN stays NaN.
inline __m256i round_to_fp8(__m512 x) {
  x = at_least(at_most(x, 448.0f), -448.0f);
  // The power of two below |x|, at least 2^-6: times 2^-3 it is the distance of two fp8 values there. A float32 sum
  // with 1.5 * 2^23 distances rounds to whole ones.
  const __m512 power = _mm512_and_ps(x, _mm512_castsi512_ps(_mm512_set1_epi32(0x7F800000)));
  const __m512 magic = _mm512_mul_ps(at_least(power, 0x1p-6f), _mm512_set1_ps(0x1.8p20f));
  const __m512 rounded = _mm512_sub_ps(_mm512_add_ps(x, magic), magic);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(rounded), 16));
}

template <Activation kActivation>
void activate_block(const Gemm1& p, int64_t block, const Scratch& scratch) {
  constexpr bool kGated = is_gated(kActivation);
  const int64_t num_steps = steps_of(p.intermediate_size);
  const int64_t column = block * (kGated ? kGatedColumns : kBlockRows);
  const int64_t left = p.intermediate_size - column;  // columns beyond are stored as zeros
  const __m512 up_scale = _mm512_set1_ps(p.up_scale), gate_scale = _mm512_set1_ps(p.gate_scale);
  for (int tile = 0; tile < p.x.num_tiles; ++tile) {
    bfloat16* inter = p.inter + (tile * num_steps + column / kStep) * kTileElements + column % kStep;
    const int num_rows = p.x.num_rows - tile * kTileRows;
    for (int row = 0; row < kTileRows && row < num_rows; ++row, inter += kStep) {
      const __m512 row_scale = _mm512_set1_ps(p.row_scales[tile * kTileRows + row]);
      const float* sums = scratch.sums[tile][0] + row * kTileRows;
      const __m512 a = _mm512_mul_ps(_mm512_load_ps(sums), row_scale);
      const __m512 b = _mm512_mul_ps(_mm512_load_ps(sums + kTileRows * kTileRows), row_scale);
      const auto store = [&](int at, __m512 value) {
        const int64_t some = left - at;
        const auto mask = static_cast<__mmask16>(some >= 16 ? 0xFFFF : some <= 0 ? 0 : (1 << some) - 1);
        const __m256i rounded = _mm256_maskz_mov_epi16(mask, round_to_fp8(value));
        _mm256_store_si256(reinterpret_cast<__m256i*>(inter + at), rounded);
      };
      if (kGated) {
        store(0, _mm512_mul_ps(activate<kActivation>(_mm512_mul_ps(b, gate_scale)), _mm512_mul_ps(a, up_scale)));
      } else {
        store(0, _mm512_mul_ps(activate<kActivation>(_mm512_mul_ps(a, gate_scale)), up_scale));
        store(16, _mm512_mul_ps(activate<kActivation>(_mm512_mul_ps(b, gate_scale)), up_scale));
      }
    }
  }
}

template <Activation kActivation>
void run_gemm1_with(const Gemm1& p, int64_t first, int64_t last, Scratch& scratch) {
  for (int64_t block = first; block < last; ++block) {
    multiply_block(p.unit, p.x, p.weights + block * p.x.num_steps * kStepBytes, scratch);
    activate_block<kActivation>(p, block, scratch);
  }
}

__mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>(count >= 16 ? 0xFFFF : (1 << count) - 1); }

void store_as(OutputType type, void* out, int64_t at, __mmask16 mask, __m512 value) {
  switch (type) {
    case OutputType::kBfloat16:
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out) + at, mask, (__m256i)_mm512_cvtneps_pbh(value));
      break;
    case OutputType::kFloat16:
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out) + at, mask,
                               _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
      break;
    case OutputType::kFloat32:
      _mm512_mask_storeu_ps(static_cast<float*>(out) + at, mask, value);
      break;
  }
}

float to_float(bfloat16 x) {
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(static_cast<uint32_t>(x) << 16))));
}

}  // namespace

UnitUse::UnitUse(Unit unit) : unit_(unit), floating_point_mode_(_mm_getcsr()) {
  // A caller may have asked for subnormal numbers to become zero: on its own thread only, and bits must not depend on
  // the thread.
  _mm_setcsr(0x1F80);
  if (unit_ == Unit::kAmx) configure_tiles();
}

UnitUse::~UnitUse() {
  if (unit_ == Unit::kAmx) release_tiles();
  _mm_setcsr(floating_point_mode_);
}

void gather_rows(const uint8_t* hidden_states, int64_t hidden_size, const int32_t* tokens, int num_rows,
                 bfloat16* tiles) {
  // Expander takes apart each quarter of its codes; put there what makes both its results consecutive.
  alignas(64) uint8_t places[kGroupBytes];
  for (int i = 0; i < kGroupBytes; ++i) places[i] = static_cast<uint8_t>(i % 16 / 8 * 32 + i / 16 * 8 + i % 8);
  const __m512i order = _mm512_load_si512(places);
  const Expander expander;
  const int64_t num_steps = steps_of(hidden_size);
  for (int row = 0; row < num_rows; ++row) {
    bfloat16* to = tiles + row / kTileRows * num_steps * kTileElements + row % kTileRows * kStep;
    const uint8_t* from = hidden_states + tokens[row] * hidden_size;
    for (int64_t step = 0; step < num_steps; step += 2, to += 2 * kTileElements) {
      const int64_t left = hidden_size - step * kStep;
      const __mmask64 mask = left >= kGroupBytes ? ~0ULL : (1ULL << left) - 1;
      __m512i first, last;
      expander.expand(_mm512_permutexvar_epi8(order, _mm512_maskz_loadu_epi8(mask, from + step * kStep)), first, last);
      _mm512_store_si512(to, first);
      if (step + 1 < num_steps) _mm512_store_si512(to + kTileElements, last);
    }
  }
}

void run_gemm1(const Gemm1& p, int64_t first, int64_t last, Scratch& scratch) {
  switch (p.activation) {
    case Activation::kGelu:
      return run_gemm1_with<Activation::kGelu>(p, first, last, scratch);
    case Activation::kSwiglu:
      return run_gemm1_with<Activation::kSwiglu>(p, first, last, scratch);
    case Activation::kGeglu:
      return run_gemm1_with<Activation::kGeglu>(p, first, last, scratch);
    case Activation::kRelu2:
      return run_gemm1_with<Activation::kRelu2>(p, first, last, scratch);
    case Activation::kIdentity:
      return run_gemm1_with<Activation::kIdentity>(p, first, last, scratch);
  }
}

void run_gemm2(const Gemm2& p, int64_t first, int64_t last, Scratch& scratch) {
  const __m512 scale = _mm512_set1_ps(p.scale);
  for (int64_t block = first; block < last; ++block) {
    multiply_block(p.unit, p.inter, p.weights + block * p.inter.num_steps * kStepBytes, scratch);
    const int64_t left = p.hidden_size - block * kBlockRows;
    const __mmask32 mask = left >= kBlockRows ? ~0U : (1U << left) - 1;
    for (int row = 0; row < p.inter.num_rows; ++row) {
      const float* sums = scratch.sums[row / kTileRows][0] + row % kTileRows * kTileRows;
      const __m512 low = _mm512_mul_ps(_mm512_load_ps(sums), scale);
      const __m512 high = _mm512_mul_ps(_mm512_load_ps(sums + kTileRows * kTileRows), scale);
      _mm512_mask_storeu_epi16(p.g + row * p.hidden_size + block * kBlockRows, mask,
                               (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  }
}

void finalize(const Finalize& p, int64_t first, int64_t last) {
  for (int64_t token = first; token < last; ++token) {
    const int32_t* rows = p.row_of_slot + token * p.top_k;
    for (int64_t column = 0; column < p.hidden_size; column += 16) {
      const __mmask16 mask = first_lanes(p.hidden_size - column);
      __m512 total = _mm512_setzero_ps();
      for (int64_t k = 0; k < p.top_k; ++k) {
        if (rows[k] < 0) continue;
        const bfloat16* g = p.g + rows[k] * p.hidden_size + column;
        const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, g)), 16);
        const float weight = p.weights == nullptr ? 1.0f : to_float(p.weights[token * p.top_k + k]);
        total = _mm512_add_ps(total, _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(weight)));
      }
      store_as(p.type, p.out, token * p.hidden_size + column, mask, total);
    }
  }
}

}  // namespace expertd::cpu_experts

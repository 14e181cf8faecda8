"""The C++ of the CPU's kernels, compiled by `native` where there is a compiler.

Blocks have a fixed size, and their sums are added up in a fixed order in double precision: the
result does not depend on the number of threads. The bias is a fused multiply-add, as in torch's
addcmul where a processor has one: equal bit for bit.
"""

CODE = r"""
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t BLOCK = 1 << 15, PART = 4096, LANES = 32;

inline float from_bits(uint32_t bits) { float f; std::memcpy(&f, &bits, 4); return f; }
inline uint32_t to_bits(float f) { uint32_t bits; std::memcpy(&bits, &f, 4); return bits; }

struct F32 {
  using T = float;
  static inline float load(T x, const float*) { return x; }
  static inline T store(float x) { return x; }
};
struct BF16 {
  using T = uint16_t;
  static inline float load(T x, const float*) { return from_bits(uint32_t(x) << 16); }
  static inline T store(float x) {  // to nearest even; NaN stays NaN
    uint32_t bits = to_bits(x);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
};
struct F16 {
  using T = uint16_t;
  static inline float load(T x, const float*) {
    uint32_t word = uint32_t(x) << 16, sign = word & 0x80000000u, twice = word + word;
    float normal = from_bits((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
    float denormal = from_bits((twice >> 17) | (126u << 23)) - 0.5f;
    return from_bits(sign | (twice < (1u << 27) ? to_bits(denormal) : to_bits(normal)));
  }
};
struct I8 {
  using T = int8_t;
  static inline float load(T x, const float*) { return float(x); }
};
struct F8 {
  using T = uint8_t;
  static inline float load(T x, const float* table) { return table[x]; }
};

struct Run {  // as `native` lays it out: eight numbers of 64 bits
  void* gradient; const void* delta; const float* scales;
  int64_t numel, first, width, by_column, slot;
};

// What a stored delta is multiplied with: nothing, the scale of its row, or that of its column.
struct Plain { inline float operator()(float x, int64_t) const { return x; } };
struct ByRow { float scale; inline float operator()(float x, int64_t) const { return x * scale; } };
struct ByColumn {
  const float* scales;
  inline float operator()(float x, int64_t i) const { return x * scales[i]; }
};

// Call `body(first, end, scaling)` for each stretch of elements with one scaling.
template <class D, class Body>
inline void each_stretch(const Run& run, int64_t begin, int64_t end, Body body) {
  if constexpr (sizeof(typename D::T) > 1) body(begin, end, Plain{});
  else if (!run.scales) body(begin, end, Plain{});
  else for (int64_t i = begin; i < end;) {
    int64_t row = (run.first + i) / run.width, col = (run.first + i) % run.width;
    int64_t stop = i + run.width - col < end ? i + run.width - col : end;
    if (run.by_column) body(i, stop, ByColumn{run.scales + col});
    else body(i, stop, ByRow{run.scales[row]});
    i = stop;
  }
}

template <class G, class D, class Scaling>
inline void add_part(
    const typename G::T* __restrict g, const typename D::T* __restrict d, int64_t count,
    Scaling scaling, int64_t at, const float* table, double* out) {
  float gg[LANES] = {}, gd[LANES] = {};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    for (int64_t j = 0; j < LANES; ++j) {
      float x = G::load(g[i + j], table);
      float y = scaling(D::load(d[i + j], table), at + i + j);
      gg[j] = __builtin_fmaf(x, x, gg[j]);
      gd[j] = __builtin_fmaf(x, y, gd[j]);
    }
  for (int64_t j = 0; i + j < count; ++j) {
    float x = G::load(g[i + j], table);
    float y = scaling(D::load(d[i + j], table), at + i + j);
    gg[j] = __builtin_fmaf(x, x, gg[j]);
    gd[j] = __builtin_fmaf(x, y, gd[j]);
  }
  for (int64_t j = 0; j < LANES; ++j) {
    out[0] += gg[j];
    out[1] += gd[j];
  }
}

template <class G, class D>
void sums_of(const Run& run, int64_t begin, int64_t end, const float* table, double* out) {
  auto* g = static_cast<const typename G::T*>(run.gradient);
  auto* d = static_cast<const typename D::T*>(run.delta);
  out[0] = out[1] = 0;
  each_stretch<D>(run, begin, end, [&](int64_t from, int64_t to, auto scaling) {
    for (int64_t i = from; i < to; i += PART)
      add_part<G, D>(g + i, d + i, i + PART < to ? PART : to - i, scaling, i - from, table, out);
  });
}

template <class G, class D>
void bias_of(const Run& run, int64_t begin, int64_t end, const float* table, float c) {
  auto* g = static_cast<typename G::T*>(run.gradient);
  auto* d = static_cast<const typename D::T*>(run.delta);
  each_stretch<D>(run, begin, end, [&](int64_t from, int64_t to, auto scaling) {
    auto* __restrict gradient = g + from;
    auto* __restrict delta = d + from;
    for (int64_t i = 0; i < to - from; ++i) {
      float y = -scaling(D::load(delta[i], table), i);
      gradient[i] = G::store(__builtin_fmaf(y, c, G::load(gradient[i], table)));
    }
  });
}

using Sums = void (*)(const Run&, int64_t, int64_t, const float*, double*);
using Bias = void (*)(const Run&, int64_t, int64_t, const float*, float);

#define ROW(F, G) {F<G, F32>, F<G, BF16>, F<G, F16>, F<G, I8>, F<G, F8>}
const Sums SUMS[2][5] = {ROW(sums_of, F32), ROW(sums_of, BF16)};
const Bias BIAS[2][5] = {ROW(bias_of, F32), ROW(bias_of, BF16)};

struct Block { int64_t run, begin, end; };

std::vector<Block> blocks_of(const Run* runs, int64_t num_runs) {
  std::vector<Block> found;
  for (int64_t r = 0; r < num_runs; ++r)
    for (int64_t i = 0; i < runs[r].numel; i += BLOCK)
      found.push_back({r, i, i + BLOCK < runs[r].numel ? i + BLOCK : runs[r].numel});
  return found;
}

}  // namespace

extern "C" void drift_merge_sums(
    const Run* runs, int64_t num_runs, int gradient, int delta, const float* table, int threads,
    double* into, int64_t columns) {
  auto blocks = blocks_of(runs, num_runs);
  int64_t count = blocks.size();
  std::vector<double> partial(2 * count);
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
  for (int64_t b = 0; b < count; ++b)
    SUMS[gradient][delta](
        runs[blocks[b].run], blocks[b].begin, blocks[b].end, table, &partial[2 * b]);
  for (int64_t b = 0; b < count; ++b) {
    double* to = into + runs[blocks[b].run].slot * columns;
    to[0] += partial[2 * b];
    to[1] += partial[2 * b + 1];
  }
}

extern "C" void drift_merge_bias(
    const Run* runs, int64_t num_runs, int gradient, int delta, const float* table, int threads,
    const double* coefficients) {
  auto blocks = blocks_of(runs, num_runs);
  int64_t count = blocks.size();
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
  for (int64_t b = count - 1; b >= 0; --b)  // the last ones are still in the cache
    BIAS[gradient][delta](
        runs[blocks[b].run], blocks[b].begin, blocks[b].end, table,
        float(coefficients[runs[blocks[b].run].slot]));
}
"""

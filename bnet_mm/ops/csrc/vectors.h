// Vectors of VECTOR_BYTES, and their way from and to memory. For kernels.h, which is included once per instruction set.

template <typename A>
struct Vector {
  static constexpr int lanes = VECTOR_BYTES / sizeof(A);
  typedef A type __attribute__((vector_size(VECTOR_BYTES)));
  typedef A unaligned __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(A)), may_alias));
};

template <>
struct Vector<at::BFloat16> : Vector<float> {};  // what is stored in bfloat16 is computed in float32

template <typename A>
inline typename Vector<A>::type load(const A* p) {
  return *reinterpret_cast<const typename Vector<A>::unaligned*>(p);
}

template <typename A>
inline void store(A* p, typename Vector<A>::type v) {
  *reinterpret_cast<typename Vector<A>::unaligned*>(p) = v;
}

// All bits set in the first `count` lanes.
template <typename A>
inline auto first_lanes(int64_t count) {
  using I = typename std::conditional<sizeof(A) == 8, int64_t, int32_t>::type;
  typedef I mask __attribute__((vector_size(VECTOR_BYTES)));
  mask lane;
  for (int c = 0; c < Vector<A>::lanes; ++c) lane[c] = c;
  return lane < static_cast<I>(count);
}

// The first `count` lanes, the others 0; and the store that leaves the memory beyond them alone.
template <typename A>
inline typename Vector<A>::type load_first(const A* p, int64_t count) {
  A values[Vector<A>::lanes] = {};
  std::copy_n(p, count, values);
  return load(values);
}

template <typename A>
inline void store_first(A* p, typename Vector<A>::type v, int64_t count) {
  A values[Vector<A>::lanes];
  store(values, v);
  std::copy_n(values, count, p);
}

#if VECTOR_BYTES == 64
inline Vector<float>::type load_first(const float* p, int64_t count) {
  return reinterpret_cast<Vector<float>::type>(_mm512_maskz_loadu_ps((1u << count) - 1, p));
}
inline void store_first(float* p, Vector<float>::type v, int64_t count) {
  _mm512_mask_storeu_ps(p, (1u << count) - 1, reinterpret_cast<__m512>(v));
}
#elif VECTOR_BYTES == 32
inline Vector<float>::type load_first(const float* p, int64_t count) {
  const auto mask = reinterpret_cast<__m256i>(first_lanes<float>(count));
  return reinterpret_cast<Vector<float>::type>(_mm256_maskload_ps(p, mask));
}
inline void store_first(float* p, Vector<float>::type v, int64_t count) {
  const auto mask = reinterpret_cast<__m256i>(first_lanes<float>(count));
  _mm256_maskstore_ps(p, mask, reinterpret_cast<__m256>(v));
}
#endif

// bfloat16 is the upper half of a float32; rounded to nearest even, NaN stays NaN.
typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));

inline Vector<float>::type widen(Halves halves) {
  return reinterpret_cast<Vector<float>::type>(__builtin_convertvector(halves, Bits) << 16);
}

inline Halves narrow(Vector<float>::type v) {
  const Bits bits = reinterpret_cast<Bits>(v);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits kept = v == v ? rounded : Bits{} + 0x7fc0;
  return __builtin_convertvector(kept, Halves);
}

inline Vector<float>::type load(const at::BFloat16* p) { return widen(*reinterpret_cast<const Halves*>(p)); }

inline void store(at::BFloat16* p, Vector<float>::type v) { *reinterpret_cast<Halves*>(p) = narrow(v); }

inline Vector<float>::type load_first(const at::BFloat16* p, int64_t count) {
#if VECTOR_BYTES == 64
  return widen(reinterpret_cast<Halves>(_mm256_maskz_loadu_epi16((1u << count) - 1, p)));
#else
  at::BFloat16 values[Vector<float>::lanes] = {};
  std::copy_n(p, count, values);
  return load(values);
#endif
}

inline void store_first(at::BFloat16* p, Vector<float>::type v, int64_t count) {
#if VECTOR_BYTES == 64
  _mm256_mask_storeu_epi16(p, (1u << count) - 1, reinterpret_cast<__m256i>(narrow(v)));
#else
  at::BFloat16 values[Vector<float>::lanes];
  store(values, v);
  std::copy_n(values, count, p);
#endif
}
// Which lanes of a vector are a row's: all, or the first `count`, behind which the same map goes on for `room` values.
struct All {};
struct First {
  int64_t count, room;
};

// Those lanes, the others 0.
template <typename A>
inline typename Vector<A>::type only(typename Vector<A>::type v, All) { return v; }
template <typename A>
inline typename Vector<A>::type only(typename Vector<A>::type v, First f) {
  return first_lanes<A>(f.count) ? v : typename Vector<A>::type{};
}

template <typename S>
inline typename Vector<S>::type load(const S* p, All) { return load(p); }
template <typename S>
inline typename Vector<S>::type load(const S* p, First f) {
  return f.room >= Vector<S>::lanes ? load(p) : load_first(p, f.count);
}

// Where there is room, the other lanes go to memory that a later store of the same map overwrites: masked stores, and
// those by way of the stack, are slow.
template <typename S>
inline void store(S* p, typename Vector<S>::type v, All) { store(p, v); }
template <typename S>
inline void store(S* p, typename Vector<S>::type v, First f) {
  if (f.room >= Vector<S>::lanes) store(p, v);
  else store_first(p, v, f.count);
}

// The sum of the lanes at `lane`.
template <typename A>
inline double sum_of(const A* lane) {
  double sums[Vector<A>::lanes];
  for (int c = 0; c < Vector<A>::lanes; ++c) sums[c] = lane[c];
#pragma GCC unroll 4
  for (int half = Vector<A>::lanes / 2; half > 0; half /= 2) {
    for (int c = 0; c < half; ++c) sums[c] += sums[c + half];
  }
  return sums[0];
}

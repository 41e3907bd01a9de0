// The CPU kernels for one instruction set. bnet_cpu.cpp includes this file once per set, each time inside a namespace
// and a target region of its own and with VECTOR_BYTES defined; there is no include guard on purpose.
//
// A map is handled in bands of R output rows. Its rows live in a ring of R + K - 1 line buffers, padded with zeros at
// both ends, so that a tap is a load at an offset and every loaded vector serves up to min(R, K) taps. In NCHW the lanes
// of a vector are neighbouring columns of one channel; in channels_last (NHWC) they are neighbouring channels of one
// pixel. The two differ only in how line buffers are filled and emptied, and in the distance of neighbouring columns.

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

// The first `count` lanes as S, or all of them if `full`.
template <bool full, typename S, typename A>
inline void write(S* p, typename Vector<A>::type v, int64_t count) {
  if (full) store(p, v);
  else store_first(p, v, count);
}

template <bool full, typename S, typename A>
inline typename Vector<A>::type read(const S* p, int64_t count) {
  return full ? load(p) : load_first(p, count);
}

// The memory of one map: where its elements are, which lanes of a vector count.
// S is the stored type, A the type of all arithmetic.
template <typename S, typename A, bool channels_last>
struct Map {
  static constexpr int lanes = Vector<A>::lanes;
  static constexpr int shift = channels_last ? lanes : 1;  // distance of neighbouring columns in a line buffer

  int64_t height, width, channels;  // channels: C of the tensor
  int64_t used;                     // channels_last: lanes that are channels; the last group may have fewer

  int64_t columns() const { return width * shift; }  // length of a row in a line buffer

  // Row h as A into a line buffer; with (value - mean) * rstd if `normalise`.
  template <bool normalise>
  void read_row(const S* map, int64_t h, typename Vector<A>::type mean, typename Vector<A>::type rstd, A* row) const {
    const S* p = map + h * row_step();
    const int64_t count = lanes_of_last(), full = full_vectors();
    for (int64_t i = 0; i < full; ++i, p += step(), row += lanes) {
      const auto v = read<true, S, A>(p, lanes);
      store(row, normalise ? (v - mean) * rstd : v);
    }
    for (int64_t i = full; i < vectors(); ++i, p += step(), row += lanes) {
      const auto v = read<false, S, A>(p, count);
      store(row, normalise ? (first_lanes<A>(count) ? (v - mean) * rstd : typename Vector<A>::type{}) : v);
    }
  }

  // A row is `vectors()` vectors, `step()` apart in memory, of which the first `full_vectors()` have all their lanes.
  int64_t vectors() const { return channels_last ? width : (width + lanes - 1) / lanes; }
  int64_t full_vectors() const { return channels_last ? (used == lanes ? width : 0) : width / lanes; }
  int64_t step() const { return channels_last ? channels : lanes; }
  int64_t lanes_of_last() const { return channels_last ? used : width % lanes; }
  int64_t row_step() const { return channels_last ? width * channels : width; }
};

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

// Line buffers of one map: a ring of rows with at least `margin` zeros at both ends, column 0 on a vector boundary, and
// one row of zeros for what is outside.
template <typename A>
struct Ring {
  int64_t rows, stride, margin;
  A* memory;

  static int64_t vectors_of(int64_t count) { return (count + Vector<A>::lanes - 1) / Vector<A>::lanes * Vector<A>::lanes; }
  static int64_t stride_for(int64_t columns, int64_t margin) { return vectors_of(columns) + 2 * vectors_of(margin); }
  static int64_t size(int64_t rows, int64_t columns, int64_t margin) { return (rows + 1) * stride_for(columns, margin); }

  Ring(int64_t rows, int64_t columns, int64_t margin, A* memory)
      : rows(rows), stride(stride_for(columns, margin)), margin(vectors_of(margin)), memory(memory) {}

  A* row(int64_t h) const { return memory + (h % rows) * stride + margin; }  // column 0 of row h
  A* outside() const { return memory + rows * stride + margin; }
  A* at(int64_t h, int64_t height) const { return h < 0 || h >= height ? outside() : row(h); }
};

// out[o] += sum_ij taps[j * K + i] * rows[o + i][at + (j - K / 2) * shift] for R rows o.
template <typename A, int K, int R>
inline void correlate(A* const* rows, const typename Vector<A>::type* taps, int64_t at, int shift,
                      typename Vector<A>::type* out) {
  typedef typename Vector<A>::type V;
  for (int j = 0; j < K; ++j) {
    const int64_t column = at + static_cast<int64_t>(j - K / 2) * shift;
#pragma GCC unroll 16
    for (int r = 0; r < R + K - 1; ++r) {
      const V v = load(rows[r] + column);
#pragma GCC unroll 8
      for (int o = 0; o < R; ++o) {
        if (r - o >= 0 && r - o < K) out[o] += taps[j * K + r - o] * v;
      }
    }
  }
}

template <typename S, typename A, bool channels_last, int K>
struct Kernel {
  typedef typename Vector<A>::type V;
  typedef Map<S, A, channels_last> M;
  static constexpr int lanes = Vector<A>::lanes;
  // Rows of one band: as many as the registers hold; fewer where memory is the limit, for fewer streams of it.
  static constexpr int band = VECTOR_BYTES == 64 && K > 3 ? 8 : 4;
  static constexpr int block = 32;  // vectors of a row whose sums are formed at once
  static constexpr int half = K / 2;
  static constexpr bool sevens = VECTOR_BYTES == 64;  // bands of 7, for the last maps of ImageNet networks: 14 x 14, 7 x 7
  static constexpr int ring_rows = (sevens ? std::max(band, 7) : band) + K - 1;

  // Taps of one group of channels as vectors; `flipped` for the transposed convolution of the backward pass.
  static void spread(const A* weight, int64_t used, bool flipped, V* taps) {
    for (int t = 0; t < K * K; ++t) {  // column by column, as correlate reads them
      const int row_major = t % K * K + t / K, from = flipped ? K * K - 1 - row_major : row_major;
      A values[lanes] = {};
      for (int c = 0; c < lanes; ++c) {
        if (!channels_last) values[c] = weight[from];
        else if (c < used) values[c] = weight[c * K * K + from];
      }
      taps[t] = load(values);
    }
  }

  static V spread(const A* value, int64_t used) {
    A values[lanes] = {};
    for (int c = 0; c < (channels_last ? used : lanes); ++c) values[c] = value[channels_last ? c : 0];
    return load(values);
  }

  // Calls body with the height of the next band, as a constant, and returns it.
  template <typename Body>
  static int64_t with_rows(int64_t left, const Body& body) {
    if constexpr (sevens) {
      if (left == 7 || left == 14) return body(std::integral_constant<int, 7>()), 7;
    }
    if constexpr (band == 8) {
      if (left >= 8) return body(std::integral_constant<int, 8>()), 8;
    }
    if (left >= 4) return body(std::integral_constant<int, 4>()), 4;
    return body(std::integral_constant<int, 1>()), 1;
  }

  static int64_t forward_scratch(int64_t width) {
    return Ring<A>::size(ring_rows, width * M::shift, half * M::shift);
  }

  // One map: y = act(correlation of (x - mean) * rstd with the taps + bias + residual). `scratch` is zero, and its
  // margins stay so.
  static void forward(const M& map, const S* x, const S* residual, S* y, const A* mean, const A* rstd, const A* weight,
                      const A* bias, bool relu, A* scratch) {
    V taps[K * K];
    spread(weight, map.used, false, taps);
    const V start = spread(bias, map.used), centre = spread(mean, map.used), scale = spread(rstd, map.used);
    const Ring<A> ring(ring_rows, map.columns(), half * M::shift, scratch);
    int64_t filled = 0;
    for (int64_t h = 0; h < map.height;) {
      h += with_rows(map.height - h, [&](auto rows) {
        const int64_t needed = std::min(h + rows() + half, map.height);
        for (; filled < needed; ++filled) map.template read_row<true>(x, filled, centre, scale, ring.row(filled));
        forward_band<rows()>(map, ring, taps, start, h, x, residual, y, relu);
      });
    }
  }

  template <int R>
  static void forward_band(const M& map, const Ring<A>& ring, const V* taps, V start, int64_t h, const S* x,
                           const S* residual, S* y, bool relu) {
    A* rows[R + K - 1];
    for (int r = 0; r < R + K - 1; ++r) rows[r] = ring.at(h - half + r, map.height);
    const int64_t row_step = map.row_step(), first = h * row_step, full = map.full_vectors();
    for (int64_t i = 0; i < full; ++i) {
      prefetch<R, false>(x + first + (R + half) * row_step + i * map.step(), row_step);
      prefetch<R, true>(y + first + R * row_step + i * map.step(), row_step);
      forward_vector<R, true>(map, rows, taps, start, i, first + i * map.step(), row_step, residual, y, relu);
    }
    for (int64_t i = full; i < map.vectors(); ++i) {
      forward_vector<R, false>(map, rows, taps, start, i, first + i * map.step(), row_step, residual, y, relu);
    }
  }

  // What the next band will read, or write, at this column, so that its way from memory passes during the arithmetic;
  // only to L2 where there is too little of that to hide more.
  template <int R, bool written>
  static inline void prefetch(const S* p, int64_t row_step) {
#pragma GCC unroll 8
    for (int o = 0; o < R; ++o) __builtin_prefetch(p + o * row_step, written, written || K > 3 ? 3 : 2);
  }

  // Vector i of R rows; `at` is its place in memory.
  template <int R, bool full>
  static inline void forward_vector(const M& map, A* const* rows, const V* taps, V start, int64_t i, int64_t at,
                                    int64_t row_step, const S* residual, S* y, bool relu) {
    V out[R];
#pragma GCC unroll 8
    for (int o = 0; o < R; ++o) out[o] = start;
    correlate<A, K, R>(rows, taps, i * lanes, M::shift, out);
    const int64_t count = map.lanes_of_last();
    if (residual) {
      for (int o = 0; o < R; ++o) out[o] += read<full, S, A>(residual + at + o * row_step, count);
    }
    if (relu) {
      for (int o = 0; o < R; ++o) out[o] = out[o] < A(0) ? V{} : out[o];  // NaN stays
    }
#pragma GCC unroll 8
    for (int o = 0; o < R; ++o) write<full, S, A>(y + at + o * row_step, out[o], count);
  }

  static int64_t backward_scratch(int64_t width) {
    return 2 * Ring<A>::size(ring_rows, width * M::shift, half * M::shift) + (K * K + 3) * lanes;
  }

  // One map: grad_x = rstd * g^, with g^ the transposed correlation of grad with the taps; and into `sums`, one row of
  // K * K + 3 numbers per channel: sums of grad * x^ per tap, of grad, of g^, and of g^ * x^. The first K * K only if
  // `needs_weight`, the last two only if `needs_statistics`. G is the stored type of grad_x: S, or A.
  template <typename G>
  static void backward(const M& map, const S* grad, const S* x, G* grad_x, const A* mean, const A* rstd, const A* weight,
                       bool needs_weight, bool needs_statistics, double* sums, A* scratch) {
    V taps[K * K];
    spread(weight, map.used, true, taps);
    const V centre = spread(mean, map.used), scale = spread(rstd, map.used);
    const int64_t ring_size = Ring<A>::size(ring_rows, map.columns(), half * M::shift);
    const Ring<A> x_ring(ring_rows, map.columns(), half * M::shift, scratch);
    const Ring<A> g_ring(ring_rows, map.columns(), half * M::shift, scratch + ring_size);
    A* partial = scratch + 2 * ring_size;
    std::fill_n(partial, (K * K + 3) * lanes, A(0));
    // Sums in three levels: blocks of vectors, up to `block` blocks in `partial`, and the double sums.
    const int64_t flush_every = std::max<int64_t>(1, block / ((map.vectors() + block - 1) / block));
    int64_t filled = 0, bands = 0;
    for (int64_t h = 0; h < map.height;) {
      h += with_rows(map.height - h, [&](auto rows) {
        const int64_t needed = std::min(h + rows() + half, map.height);
        for (; filled < needed; ++filled) {
          map.template read_row<true>(x, filled, centre, scale, x_ring.row(filled));
          map.template read_row<false>(grad, filled, centre, scale, g_ring.row(filled));
        }
        backward_band<rows()>(map, x_ring, g_ring, taps, scale, h, grad_x, needs_weight, needs_statistics, partial);
      });
      if (++bands % flush_every == 0 || h == map.height) flush(map, partial, sums);
    }
  }

  template <int R, typename G>
  static void backward_band(const M& map, const Ring<A>& x_ring, const Ring<A>& g_ring, const V* taps, V scale, int64_t h,
                            G* grad_x, bool needs_weight, bool needs_statistics, A* partial) {
    A *x_rows[R + K - 1], *g_rows[R + K - 1];
    for (int r = 0; r < R + K - 1; ++r) {
      x_rows[r] = x_ring.at(h - half + r, map.height);
      g_rows[r] = g_ring.at(h - half + r, map.height);
    }
    const int64_t row_step = map.row_step(), first = h * row_step;
    for (int64_t begin = 0; begin < map.vectors(); begin += block) {
      const int64_t end = std::min(begin + block, map.vectors()), full = std::min(map.full_vectors(), end);
      V sums[3] = {};
      for (int64_t i = begin; i < full; ++i) {
        backward_vector<R, true>(map, x_rows, g_rows, taps, scale, i, first + i * map.step(), row_step, grad_x,
                                 needs_statistics, sums);
      }
      for (int64_t i = std::max(begin, full); i < end; ++i) {
        backward_vector<R, false>(map, x_rows, g_rows, taps, scale, i, first + i * map.step(), row_step, grad_x,
                                  needs_statistics, sums);
      }
      for (int s = 0; s < 3; ++s) add(partial + (K * K + s) * lanes, sums[s]);
      for (int j = 0; j < (needs_weight ? K : 0); ++j) {
        V tap[K] = {};
        for (int64_t i = begin; i < full; ++i) weight_gradient<R, true>(map, x_rows, g_rows, i, j, tap);
        for (int64_t i = std::max(begin, full); i < end; ++i) {
          weight_gradient<R, false>(map, x_rows, g_rows, i, j, tap);
        }
#pragma GCC unroll 8
        for (int i = 0; i < K; ++i) add(partial + (i * K + j) * lanes, tap[i]);
      }
    }
  }

  static void add(A* p, V v) { store(p, load(p) + v); }

  // Vector i of R rows of grad_x, and its part in the sums of grad, g^ and g^ * x^.
  template <int R, bool full, typename G>
  static inline void backward_vector(const M& map, A* const* x_rows, A* const* g_rows, const V* taps, V scale, int64_t i,
                                     int64_t at, int64_t row_step, G* grad_x, bool needs_statistics, V* sums) {
    V out[R] = {};
    correlate<A, K, R>(g_rows, taps, i * lanes, M::shift, out);
    const int64_t count = map.lanes_of_last();
#pragma GCC unroll 8
    for (int o = 0; o < R; ++o) {
      sums[0] += load(g_rows[o + half] + i * lanes);  // zero beyond the map
      write<full, G, A>(grad_x + at + o * row_step, out[o] * scale, count);
    }
    if (!needs_statistics) return;
#pragma GCC unroll 8
    for (int o = 0; o < R; ++o) {
      if (!full) out[o] = first_lanes<A>(count) ? out[o] : V{};
      sums[1] += out[o];
      sums[2] += out[o] * load(x_rows[o + half] + i * lanes);
    }
  }

  // tap[i] += sum over the band's rows o of grad[o] * x^[o + i], column j.
  template <int R, bool full>
  static inline void weight_gradient(const M& map, A* const* x_rows, A* const* g_rows, int64_t i, int j, V* tap) {
    const int64_t column = i * lanes + static_cast<int64_t>(j - half) * M::shift;
    V g[R];
#pragma GCC unroll 8
    for (int o = 0; o < R; ++o) g[o] = load(g_rows[o + half] + i * lanes);
#pragma GCC unroll 16
    for (int r = 0; r < R + K - 1; ++r) {
      V v = load(x_rows[r] + column);
      // Beyond the map grad is 0, but 0 times a NaN of the map would not be.
      if (!full) v = first_lanes<A>(map.lanes_of_last()) ? v : V{};
#pragma GCC unroll 8
      for (int o = 0; o < R; ++o) {
        if (r - o >= 0 && r - o < K) tap[r - o] += g[o] * v;
      }
    }
  }

  // Add the lanes of `partial` to the sums of their channels, and clear them.
  static void flush(const M& map, A* partial, double* sums) {
    for (int t = 0; t < K * K + 3; ++t) {
      if (channels_last) {
        for (int64_t c = 0; c < map.used; ++c) sums[c * (K * K + 3) + t] += partial[t * lanes + c];
      } else {
        sums[t] += sum_of(partial + t * lanes);
      }
    }
    std::fill_n(partial, (K * K + 3) * lanes, A(0));
  }
};

// Sums over maps, without taps.
template <typename S, typename A, bool channels_last>
struct Moments {
  typedef typename Vector<A>::type V;
  static constexpr int lanes = Vector<A>::lanes;

  // sums[c] += sum of x - centre over the map, and squares[c] += the sum of its squares, if that is wanted; centre, sums
  // and squares have one value per channel.
  template <bool wants_squares>
  static void accumulate(const Map<S, A, channels_last>& map, const S* x, const A* centre, double* sums, double* squares) {
    const int64_t pixels = map.height * map.width;
    constexpr int64_t terms = 128;  // of a lane, before it joins the double sums
    if (channels_last) {
      const V middle = load_first(centre, map.used);
      for (int64_t start = 0; start < pixels; start += terms) {
        V total = {}, square = {};
        for (int64_t i = start; i < std::min(start + terms, pixels); ++i) {
          const S* p = x + i * map.channels;
          const V d = (map.used == lanes ? read<true, S, A>(p, lanes) : read<false, S, A>(p, map.used)) - middle;
          total += d;
          if (wants_squares) square += d * d;
        }
        for (int c = 0; c < map.used; ++c) sums[c] += total[c];
        for (int c = 0; c < (wants_squares ? map.used : 0); ++c) squares[c] += square[c];
      }
      return;
    }
    constexpr int ways = 4;  // independent chains of additions
    const V middle = V{} + *centre;
    for (int64_t i = 0; i < pixels;) {
      V total[ways] = {}, square[ways] = {};
      const auto add = [&](V d, int way) {
        total[way] += d;
        if (wants_squares) square[way] += d * d;
      };
      const int64_t stop = std::min(pixels, i + terms * ways * lanes);
      for (; i + ways * lanes <= stop; i += ways * lanes) {
        for (int w = 0; w < ways; ++w) add(read<true, S, A>(x + i + w * lanes, lanes) - middle, w);
      }
      for (; i + lanes <= stop; i += lanes) add(read<true, S, A>(x + i, lanes) - middle, 0);
      if (i < stop) add(first_lanes<A>(stop - i) ? read<false, S, A>(x + i, stop - i) - middle : V{}, 1);
      i = stop;
      *sums += sum_of_lanes(total);
      if (wants_squares) *squares += sum_of_lanes(square);
    }
  }

  static double sum_of_lanes(const V (&chains)[4]) {
    A all[lanes];
    store(all, (chains[0] + chains[1]) + (chains[2] + chains[3]));
    return sum_of(all);
  }
};

// The loops over all maps. One thread handles one map (NCHW), or one group of channels of one image (channels_last),
// at a time, and writes only what is its own, so that results do not depend on the number of threads.
template <typename S, typename A, bool channels_last>
struct Loops {
  static constexpr int lanes = Vector<A>::lanes;
  static constexpr int group = channels_last ? lanes : 1;  // channels handled at once

  static Map<S, A, channels_last> map_of(const Sizes& size, int64_t channel) {
    return {size.height, size.width, size.channels, std::min<int64_t>(group, size.channels - channel)};
  }
  static int64_t offset(const Sizes& size, int64_t n, int64_t channel) {
    return n * size.channels * size.pixels() + channel * (channels_last ? 1 : size.pixels());
  }

  // body(map, n, channel, offset of the map in the tensor, scratch)
  template <typename Body>
  static void each(const Sizes& size, int64_t scratch_size, const Body& body) {
    const int64_t groups = (size.channels + group - 1) / group;
    at::parallel_for(0, size.batch * groups, 1, [&](int64_t begin, int64_t end) {
      std::vector<A> memory(scratch_size + lanes, A(0));
      A* scratch = memory.data();
      while (reinterpret_cast<uintptr_t>(scratch) % VECTOR_BYTES) ++scratch;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / groups, channel = i % groups * group;
        body(map_of(size, channel), n, channel, offset(size, n, channel), scratch);
      }
    });
  }

  template <int K>
  static void forward(const Sizes& size, const S* x, const A* mean, const A* rstd, int64_t sample_stride,
                      const A* weight, const A* bias, const S* residual, bool relu, S* y) {
    typedef Kernel<S, A, channels_last, K> kernel;
    each(size, kernel::forward_scratch(size.width), [&](const auto& map, int64_t n, int64_t c, int64_t at, A* scratch) {
      kernel::forward(map, x + at, residual ? residual + at : nullptr, y + at, mean + n * sample_stride + c,
                      rstd + n * sample_stride + c, weight + c * K * K, bias + c, relu, scratch);
    });
  }

  // sums: (N, C, K * K + 3), zero.
  template <int K, typename G>
  static void backward(const Sizes& size, const S* grad, const S* x, const A* mean, const A* rstd, int64_t sample_stride,
                       const A* weight, bool needs_weight, bool needs_statistics, G* grad_x, double* sums) {
    typedef Kernel<S, A, channels_last, K> kernel;
    each(size, kernel::backward_scratch(size.width), [&](const auto& map, int64_t n, int64_t c, int64_t at, A* scratch) {
      kernel::backward(map, grad + at, x + at, grad_x + at, mean + n * sample_stride + c, rstd + n * sample_stride + c,
                       weight + c * K * K, needs_weight, needs_statistics,
                       sums + (n * size.channels + c) * (K * K + 3), scratch);
    });
  }

  // mean, var (N, C) of the maps, biased; both zero.
  static void moments(const Sizes& size, const S* x, double* mean, double* var) {
    each(size, 0, [&](const auto& map, int64_t n, int64_t c, int64_t at, A*) {
      typedef Moments<S, A, channels_last> moments;
      double *m = mean + n * size.channels + c, *v = var + n * size.channels + c;
      A centre[lanes] = {};
      moments::template accumulate<false>(map, x + at, centre, m, nullptr);
      for (int i = 0; i < map.used; ++i) centre[i] = static_cast<A>(m[i] / size.pixels());
      // Around a first mean, whose own error the sums of the second pass correct.
      std::fill_n(m, map.used, 0.0);
      moments::template accumulate<true>(map, x + at, centre, m, v);
      for (int i = 0; i < map.used; ++i) {
        const double off = m[i] / size.pixels();
        m[i] = std::isinf(centre[i]) ? centre[i] : centre[i] + off;  // the mean of an infinite map is no NaN
        v[i] = v[i] / size.pixels() - off * off;
      }
    });
  }

  // grad_x = grad + shift + scale * (x - mean); the numbers (N, C) with stride sample_stride. `grad` is of type A, or
  // grad_x itself.
  template <typename G>
  static void add_moments(const Sizes& size, const G* grad, S* grad_x, const S* x, const A* mean, const A* shift,
                          const A* scale, int64_t sample_stride) {
    if (!channels_last) {
      each(size, 0, [&](const auto&, int64_t n, int64_t c, int64_t at, A*) {
        const int64_t i = n * sample_stride + c;
        const A m = mean[i], b = shift[i], a = scale[i];
        int64_t p = at;
        for (; p + lanes <= at + size.pixels(); p += lanes) {
          const auto part = b + a * (read<true, S, A>(x + p, lanes) - m);
          write<true, S, A>(grad_x + p, read<true, G, A>(grad + p, lanes) + part, lanes);
        }
        const int64_t left = at + size.pixels() - p;
        if (left) {
          const auto part = b + a * (read<false, S, A>(x + p, left) - m);
          write<false, S, A>(grad_x + p, read<false, G, A>(grad + p, left) + part, left);
        }
      });
      return;
    }
    at::parallel_for(0, size.batch * size.pixels(), 64, [&](int64_t begin, int64_t end) {
      for (int64_t pixel = begin; pixel < end; ++pixel) {
        const int64_t i = pixel / size.pixels() * sample_stride, at = pixel * size.channels;
        for (int64_t c = 0; c < size.channels; ++c) {
          const A d = static_cast<A>(x[at + c]) - mean[i + c];
          grad_x[at + c] = static_cast<S>(static_cast<A>(grad[at + c]) + (shift[i + c] + scale[i + c] * d));
        }
      }
    });
  }
};

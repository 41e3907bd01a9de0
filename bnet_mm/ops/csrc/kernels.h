// The CPU kernels for one instruction set: sweeps over one map. bnet_cpu.cpp includes this file once per set, each time
// inside a namespace and a target region of its own and with VECTOR_BYTES defined; there is no include guard on purpose.
//
// A map is handled in bands of R output rows. Its rows live in a ring of line buffers, padded with zeros at both ends,
// so that a tap is a load at an offset and every loaded vector serves up to min(R, K) taps. In NCHW the lanes of a vector
// are neighbouring columns of one channel; in channels_last (NHWC) they are neighbouring channels of one pixel. The two
// differ only in how line buffers are filled and emptied, and in the distance of neighbouring columns.

#include "vectors.h"

// The memory of one map: where its elements are, which lanes of a vector count.
// S is the stored type, A the type of all arithmetic.
template <typename S, typename A, bool channels_last>
struct Map {
  static constexpr int lanes = Vector<A>::lanes;
  static constexpr int shift = channels_last ? lanes : 1;  // distance of neighbouring columns in a line buffer

  int64_t height, width, channels;  // channels: C of the tensor
  int64_t used;                     // channels_last: lanes that are channels; the last group may have fewer

  int64_t row_step() const { return channels_last ? width * channels : width; }
  int64_t columns() const { return width * shift; }  // length of a row in a line buffer
  int64_t vectors() const { return channels_last ? width : (width + lanes - 1) / lanes; }
  bool whole() const { return channels_last ? used == lanes : width >= lanes; }  // all vectors have all their lanes

  // Where the last vector of a row begins in a line buffer. In NCHW it ends with the row, and shares lanes with the one
  // before.
  int64_t last_column() const { return channels_last ? (width - 1) * lanes : std::max<int64_t>(0, width - lanes); }

  // Calls body(i * lanes, place in a line buffer, place in memory) for vectors i from `begin` to `end` of a row.
  template <typename Body>
  void each_vector(int64_t begin, int64_t end, const Body& body) const {
    const int64_t last = last_column();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = std::min(i * lanes, last);
      body(i * lanes, column, channels_last ? i * channels : column);
    }
  }

  // The lanes of the vector at `place` of the map; `all`: whole() is known to be true.
  template <bool all>
  auto lanes_at(int64_t place) const {
    if constexpr (all) return All();
    else return channels_last ? First{used, 0} : First{width, height * width - place};
  }
};

// Line buffers of one map: a ring of rows (a power of two) with at least `margin` zeros at both ends, column 0 on a
// vector boundary, and one row of zeros for what is outside.
template <typename A, int rows>
struct Ring {
  int64_t stride, margin;
  A* memory;

  static int64_t vectors_of(int64_t count) { return (count + Vector<A>::lanes - 1) / Vector<A>::lanes * Vector<A>::lanes; }
  static int64_t stride_for(int64_t columns, int64_t margin) { return vectors_of(columns) + 2 * vectors_of(margin); }
  static int64_t size(int64_t columns, int64_t margin) { return (rows + 1) * stride_for(columns, margin); }

  Ring(int64_t columns, int64_t margin, A* memory)
      : stride(stride_for(columns, margin)), margin(vectors_of(margin)), memory(memory) {}

  A* row(int64_t h) const { return memory + (h & (rows - 1)) * stride + margin; }  // column 0 of row h
  A* at(int64_t h, int64_t height) const { return h < 0 || h >= height ? memory + rows * stride + margin : row(h); }
};

// What a row of a line buffer is read from: (x - centre) * scale;
template <typename S, typename A>
struct Normalised {
  const S* x;
  typename Vector<A>::type centre, scale;

  const S* memory() const { return x; }

  template <typename Lanes>
  auto operator()(int64_t at, Lanes lanes) const { return (load(x + at, lanes) - centre) * scale; }
};

// or a gradient, 0 where a ReLU has made y 0 (NaN lets it pass), which also goes to `masked`, if these are given.
template <typename S, typename A>
struct Gradient {
  const S *grad, *y;
  S* masked;

  const S* memory() const { return grad; }

  template <typename Lanes>
  auto operator()(int64_t at, Lanes lanes) const {
    auto g = load(grad + at, lanes);
    if (y) g = load(y + at, lanes) <= A(0) ? typename Vector<A>::type{} : g;
    if (masked) store(masked + at, g, lanes);
    return g;
  }
};

template <typename S, typename A, bool channels_last, int K>
struct Kernel {
  typedef typename Vector<A>::type V;
  typedef Map<S, A, channels_last> M;
  static constexpr int lanes = Vector<A>::lanes;
  static constexpr int half = K / 2;
  static constexpr int band = 7;  // rows: the registers hold their sums, and maps of ImageNet networks are multiples
  static constexpr int ring_rows = K == 1 ? 8 : 16;  // the least power of two from band + K - 1
  typedef Ring<A, ring_rows> Rows;

  // Calls body with the height of the next band, as a constant, and returns it.
  template <bool whole, typename Body>
  static int64_t with_rows(int64_t left, const Body& body) {
    if (left >= band) return body(std::integral_constant<int, band>()), band;
    if constexpr (whole) {
      if (left >= 4) return body(std::integral_constant<int, 4>()), 4;
    }
    return body(std::integral_constant<int, 1>()), 1;
  }

  // The number of the map's channel in all lanes, or those of its channels; `step` apart in memory.
  static V spread(const A* value, int64_t used, int64_t step = 1) {
    if (!channels_last) return V{} + *value;
    A values[lanes] = {};
    for (int c = 0; c < used; ++c) values[c] = value[c * step];
    return load(values);
  }

  // Taps (K x K for each channel) column by column, as they are read; `flipped` for the transposed correlation.
  static void spread_taps(const A* weight, int64_t used, bool flipped, V* taps) {
    for (int t = 0; t < K * K; ++t) {
      const int row_major = t % K * K + t / K;
      taps[t] = spread(weight + (flipped ? K * K - 1 - row_major : row_major), used, K * K);
    }
  }

  template <bool whole, typename Source>
  static void fill(const M& map, const Source& source, int64_t h, A* row) {
    const int64_t first = h * map.row_step();
    map.each_vector(0, map.vectors(), [&](int64_t, int64_t column, int64_t at) {
      const auto those = map.template lanes_at<whole>(first + at);
      store(row + column, only<A>(source(first + at, those), those));
    });
  }

  static int64_t ring_size(int64_t width) { return Rows::size(width * M::shift, half * M::shift); }

  // act(start + correlation with the taps + scale * (added - centre)); without `added` the last part is missing.
  struct Transform {
    V taps[K * K], start, scale, centre;
    bool relu;
  };

  // One map. `ring` is memory of ring_size() zeros, whose margins stay so.
  template <typename Source, typename T>
  static void transform(const M& map, const Source& source, const S* added, const Transform& how, T* out, A* ring) {
    if (map.whole()) transform<true>(map, source, added, how, out, ring);
    else transform<false>(map, source, added, how, out, ring);
  }

  template <bool whole, typename Source, typename T>
  static void transform(const M& map, const Source& source, const S* added, const Transform& how, T* out, A* memory) {
    const Rows ring(map.columns(), half * M::shift, memory);
    int64_t filled = 0;
    for (int64_t h = 0; h < map.height;) {
      h += with_rows<whole>(map.height - h, [&](auto rows) {
        const int64_t needed = std::min(h + rows() + half, map.height);
        for (; filled < needed; ++filled) fill<whole>(map, source, filled, ring.row(filled));
        const A* lines[rows() + K - 1];
        for (int r = 0; r < rows() + K - 1; ++r) lines[r] = ring.at(h - half + r, map.height);
        transform_band<rows(), whole>(map, lines, source.memory(), added, how, h, out);
      });
    }
  }

  template <int R, bool whole, typename T>
  ONCE static void transform_band(const M& map, const A* const* lines, const S* in, const S* added, const Transform& how,
                                  int64_t h, T* out) {
    const int64_t row_step = map.row_step();
    const bool is_last = h + R >= map.height;
    map.each_vector(0, map.vectors(), [&](int64_t, int64_t column, int64_t at) {
      V sums[R];
#pragma GCC unroll 8
      for (int o = 0; o < R; ++o) sums[o] = how.start;
      at += h * row_step;
      if (!is_last) {
        prefetch<R, false>(in + at + (R + half) * row_step, row_step);
        prefetch<R, true>(out + at + R * row_step, row_step);
      }
      correlate<R>(lines, how.taps, column, sums);
#pragma GCC unroll 8
      for (int o = 0; o < R; ++o, at += row_step) {
        const auto those = map.template lanes_at<whole>(at);
        V v = sums[o];
        if (added) v += how.scale * (load(added + at, those) - how.centre);
        if (how.relu) v = v < A(0) ? V{} : v;  // NaN stays
        store(out + at, v, those);
      }
    });
  }

  // What the next band will read, or write, at this column, so that its way from memory passes during the arithmetic;
  // only to L2 where there is too little of that to hide more.
  template <int R, bool written, typename T>
  static inline void prefetch(const T* p, int64_t row_step) {
#pragma GCC unroll 8
    for (int o = 0; o < R; ++o) __builtin_prefetch(p + o * row_step, written, written || K > 3 ? 3 : 2);
  }

  // sums[o] += sum_ij taps[j * K + i] * lines[o + i][at + (j - half) * shift] for R rows o.
  template <int R>
  static inline void correlate(const A* const* lines, const V* taps, int64_t at, V* sums) {
    for (int j = 0; j < K; ++j) {
      const int64_t column = at + static_cast<int64_t>(j - half) * M::shift;
#pragma GCC unroll 16
      for (int r = 0; r < R + K - 1; ++r) {
        const V v = load(lines[r] + column);
#pragma GCC unroll 8
        for (int o = 0; o < R; ++o) {
          if (r - o >= 0 && r - o < K) sums[o] += taps[j * K + r - o] * v;
        }
      }
    }
  }

  // Sums of maps of one channel, or one group of them, of a gradient g and of x: first K * K of g * x^, one per tap;
  // then those of g over what each tap sees of it, in parts (see windows()): for all rows, the first, second ... row
  // from the top, and from the bottom, the whole sum, and the first, second ... column from the left, and the right.
  // Formed in three levels: blocks of vectors, up to `block` of them in `partial`, and the double sums.
  static constexpr int count = 2 * K * K;
  static constexpr int64_t block = 32;

  struct Sums {
    A* partial;     // vectors
    double* total;  // `count` for each channel
    int64_t used, added;

    void add(int number, V v) { store(partial + number * lanes, load(partial + number * lanes) + v); }

    void flush() {
      for (int s = 0; s < count; ++s) {
        const A* lane = partial + s * lanes;
        if (channels_last) {
          for (int64_t c = 0; c < used; ++c) total[c * count + s] += lane[c];
        } else {
          total[s] += sum_of(lane);
        }
      }
      std::fill_n(partial, count * lanes, A(0));
      added = 0;
    }
  };

  // The line buffers of sums(): x^, a band of g as vectors one after the other, and the partial sums.
  static int64_t sums_scratch(int64_t width) {
    return ring_size(width) + band * Rows::vectors_of(width * M::shift) + count * lanes;
  }

  // Add one map to the sums; the first K * K only if `needs_taps`, of the others only the whole sum without
  // `needs_windows`. flush() follows after the last map.
  template <typename Source>
  static void sums(const M& map, const Normalised<S, A>& x, const Source& grad, bool needs_taps, bool needs_windows,
                   Sums& sums, A* scratch) {
    if (map.whole()) add_map<true>(map, x, grad, needs_taps, needs_windows, sums, scratch);
    else add_map<false>(map, x, grad, needs_taps, needs_windows, sums, scratch);
  }

  template <bool whole, typename Source>
  static void add_map(const M& map, const Normalised<S, A>& x, const Source& grad, bool needs_taps, bool needs_windows,
                      Sums& sums, A* scratch) {
    const Rows ring(map.columns(), half * M::shift, scratch);
    A* const g = scratch + ring_size(map.width);
    const int64_t g_stride = map.vectors() * lanes;
    int64_t filled = 0;
    for (int64_t h = 0; h < map.height;) {
      h += with_rows<whole>(map.height - h, [&](auto rows) {
        const A *x_lines[rows() + K - 1], *g_lines[rows()];
        for (int o = 0; o < rows(); ++o) g_lines[o] = g + o * g_stride;
        add_gradient<rows(), whole>(map, grad, h, needs_windows, sums, g, g_stride);
        if (needs_taps) {
          const int64_t needed = std::min(h + rows() + half, map.height);
          for (; filled < needed; ++filled) fill<whole>(map, x, filled, ring.row(filled));
          for (int r = 0; r < rows() + K - 1; ++r) x_lines[r] = ring.at(h - half + r, map.height);
          add_band<rows(), whole>(map, x_lines, g_lines, sums);
        } else {
          sums.added += 1;
        }
      });
      if (sums.added >= block) sums.flush();
    }
  }

  // R rows of g from h to lines, vector by vector, each of its values in one of them only; and their part in the sums.
  template <int R, bool whole, typename Source>
  static void add_gradient(const M& map, const Source& grad, int64_t h, bool needs_windows, Sums& sums, A* lines,
                           int64_t stride) {
    const int64_t last = map.vectors() - 1, shared = channels_last ? 0 : last * lanes - map.last_column();
    const int64_t edge = needs_windows ? std::min<int64_t>(half, map.width) : 0;
    // To the sums of one kind of rows, those of some lines, whose whole sum is `total`.
    const auto add = [&](int from, V total, const A* line, int count) {
      sums.add(from, total);
      for (int64_t m = 0; m < edge; ++m) {
        const int64_t right = map.width - 1 - m;
        if constexpr (channels_last) {
          for (int o = 0; o < count; ++o) {
            sums.add(from + 1 + m, load(line + o * stride + m * lanes));
            sums.add(from + 1 + half + m, load(line + o * stride + right * lanes));
          }
        } else {
          const A* p = line + m + (m >= last * lanes ? shared : 0);
          const A* q = line + right + (right >= last * lanes ? shared : 0);
          A left_sum = 0, right_sum = 0;
          for (int o = 0; o < count; ++o) left_sum += p[o * stride], right_sum += q[o * stride];
          sums.partial[(from + 1 + m) * lanes] += left_sum;
          sums.partial[(from + 1 + half + m) * lanes] += right_sum;
        }
      }
    };
    V all = {};
    for (int o = 0; o < R; ++o) {
      V total = {};
      A* const line = lines + o * stride;
      const int64_t first = (h + o) * map.row_step(), bottom = map.height - 1 - h - o;
      const auto read = [&](int64_t at) {
        const auto those = map.template lanes_at<whole>(first + at);
        return only<A>(grad(first + at, those), those);
      };
      for (int64_t i = 0; i < last; ++i) {
        const V v = read(channels_last ? i * map.channels : i * lanes);
        store(line + i * lanes, v);
        total += v;
      }
      V v = read(channels_last ? last * map.channels : map.last_column());
      if (!channels_last) v = first_lanes<A>(shared) ? V{} : v;
      store(line + last * lanes, v);
      total += v;
      all += total;
      if (needs_windows && h + o < half) add(K * K + (1 + h + o) * K, total, line, 1);
      if (needs_windows && bottom < half) add(K * K + (1 + half + bottom) * K, total, line, 1);
    }
    add(K * K, all, lines, R);
  }

  static constexpr int most_columns = VECTOR_BYTES == 64 ? (K == 7 ? 3 : K) : K == 3 ? 3 : K == 5 ? 2 : 1;

  // The sums of g * x^ of a band, as many columns of taps at once as the registers hold.
  template <int R, bool whole>
  static void add_band(const M& map, const A* const* x_lines, const A* const* g_lines, Sums& sums) {
    for (int64_t begin = 0; begin < map.vectors(); begin += block) {
      const int64_t end = std::min(begin + block, map.vectors());
      int j = 0;
      for (; j + most_columns <= K; j += most_columns) {
        add_columns<R, most_columns, whole>(map, x_lines, g_lines, j, begin, end, sums);
      }
      if constexpr (K % most_columns) add_columns<R, K % most_columns, whole>(map, x_lines, g_lines, j, begin, end, sums);
      sums.added += 1;
    }
  }

  // Those of J columns of taps from `first`.
  template <int R, int J, bool whole>
  ONCE static void add_columns(const M& map, const A* const* x_lines, const A* const* g_lines, int first, int64_t begin,
                          int64_t end, Sums& sums) {
    constexpr int ways = K == 1 ? 4 : 1;  // independent chains of additions
    V taps[K * J * ways] = {};
    map.each_vector(begin, end, [&](int64_t slot, int64_t column, int64_t) {
      column += static_cast<int64_t>(first - half) * M::shift;
      V g[R];
#pragma GCC unroll 16
      for (int r = 0; r < R + K - 1; ++r) {
        if (r < R) g[r] = load(g_lines[r] + slot);
#pragma GCC unroll 8
        for (int j = 0; j < J; ++j) {
          V v = load(x_lines[r] + column + j * M::shift);
          // Beyond the map g is 0, but 0 times a NaN of the map would not be.
          if (!whole && !channels_last) v = only<A>(v, First{map.width, 0});
#pragma GCC unroll 8
          for (int o = 0; o < R; ++o) {
            if (r - o >= 0 && r - o < K) taps[((r - o) * J + j) * ways + o % ways] += g[o] * v;
          }
        }
      }
    });
#pragma GCC unroll 32
    for (int t = 0; t < K * J; ++t) {
      V sum = taps[t * ways];
      for (int w = 1; w < ways; ++w) sum += taps[t * ways + w];
      sums.add(t / J * K + first + t % J, sum);
    }
  }

  // The sums of one channel to those of g over what each tap sees: without the rows and columns whose neighbour at the
  // tap's offset lies beyond the map.
  static void windows(const double* sums, int64_t height, int64_t width, double* seen) {
    const auto row = [&](int from, int dj) {
      const double* part = sums + K * K + from * K;
      if (std::abs(dj) >= width) return 0.0;
      double sum = part[0];
      for (int m = 0; m < std::abs(dj); ++m) sum -= part[1 + (dj > 0 ? half : 0) + m];
      return sum;
    };
    for (int t = 0; t < K * K; ++t) {
      const int di = t / K - half, dj = t % K - half;
      double sum = row(0, dj);
      for (int m = 0; m < std::abs(di); ++m) sum -= row(1 + (di > 0 ? half : 0) + m, dj);
      seen[t] = std::abs(di) >= height ? 0.0 : sum;
    }
  }
};

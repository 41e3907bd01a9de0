// The loops over all maps, for one instruction set as kernels.h.
//
// A task is one channel (NCHW), or one group of channels (channels_last), of some samples, and writes only what is its
// own; how samples are joined depends on shapes alone, so that results do not depend on the number of threads.

#include "kernels.h"

// Mean and variance of `count` values, around which the variance is 1 / count of `squares`.
struct Moment {
  double count = 0, mean = 0, squares = 0;

  void join(const Moment& other) {  // Chan, Golub and LeVeque
    const double all = count + other.count, off = other.mean - mean;
    mean = count ? (count * mean + other.count * other.mean) / all : other.mean;
    squares += other.squares + (count ? off * off * count * other.count / all : 0);
    count = all;
  }
};

template <typename S, typename A, bool channels_last>
struct Loops {
  typedef typename Vector<A>::type V;
  typedef Map<S, A, channels_last> M;
  static constexpr int lanes = Vector<A>::lanes;
  static constexpr int group = channels_last ? lanes : 1;  // channels handled at once

  static M map_of(const Sizes& size, int64_t channel) {
    return {size.height, size.width, size.channels, std::min<int64_t>(group, size.channels - channel)};
  }
  static int64_t groups(const Sizes& size) { return (size.channels + group - 1) / group; }
  static int64_t offset(const Sizes& size, int64_t n, int64_t channel) {
    return n * size.channels * size.pixels() + channel * (channels_last ? 1 : size.pixels());
  }

  // Samples whose maps of a channel stay in the cache. In channels_last only one, whose other channels are in the same
  // lines and pages, and come next.
  static int64_t samples_of_a_task(const Sizes& size) {
    if (channels_last) return 1;
    return std::max<int64_t>(1, (int64_t(256) << 10) / (size.pixels() * group * static_cast<int64_t>(sizeof(S))));
  }

  // Line buffers and sums of one thread, zero.
  struct Scratch {
    std::vector<A> memory;
    A* begin;

    explicit Scratch(int64_t size) : memory(size + lanes, A(0)), begin(memory.data()) {
      while (reinterpret_cast<uintptr_t>(begin) % VECTOR_BYTES) ++begin;
    }
  };

  // Runs step(part, channel, scratch) for every part of the batch and group of channels.
  template <typename Step>
  static void each(const Sizes& size, int64_t parts, int64_t scratch_size, const Step& step) {
    at::parallel_for(0, parts * groups(size), 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(scratch_size);
      for (int64_t i = begin; i < end; ++i) step(i / groups(size), i % groups(size) * group, scratch.begin);
    });
  }

  // The same of two steps, with join(channel) between them, when the first step of all parts is done: in NCHW one channel
  // after the other, whose maps may then still be in the cache, or part by part where these are too few.
  template <typename First, typename Join, typename Second>
  static void each(const Sizes& size, int64_t parts, int64_t scratch_size, const First& first, const Join& join,
                   const Second& second) {
    if (channels_last || groups(size) < at::get_num_threads()) {
      each(size, parts, scratch_size, first);
      for (int64_t channel = 0; channel < size.channels; channel += group) join(channel);
      each(size, parts, scratch_size, second);
      return;
    }
    each(size, 1, scratch_size, [&](int64_t, int64_t channel, A* scratch) {
      for (int64_t part = 0; part < parts; ++part) first(part, channel, scratch);
      join(channel);
      for (int64_t part = 0; part < parts; ++part) second(part, channel, scratch);
    });
  }

  // --- Moments

  // total[c] += sum of x - centre over some maps of a channel (of group `m` of them), and squares[c] that of its
  // squares, if that is wanted.
  template <bool wants_squares>
  static void accumulate(const M& m, const S* x, int64_t samples, int64_t sample_step, V centre, double* total,
                         double* squares) {
    constexpr int ways = 4;        // independent chains of additions
    constexpr int64_t terms = 128;  // of each, before they join the double sums
    V sum[ways] = {}, square[ways] = {};
    int64_t added = 0;
    const auto add = [&](V d, int way) {
      sum[way] += d;
      if (wants_squares) square[way] += d * d;
    };
    const auto flush = [&] {
      join(m, sum, total);
      if (wants_squares) join(m, square, squares);
      added = 0;
    };
    const int64_t pixels = m.height * m.width, step = channels_last ? 1 : lanes, vectors = pixels / step;
    for (int64_t n = 0; n < samples; ++n, x += sample_step) {
      for (int64_t i = 0; i < vectors;) {
        const int64_t stop = std::min(vectors, i + (terms - added) * ways);
        const auto read = [&](int64_t i) {
          return channels_last ? m.used == lanes ? load(x + i * m.channels) : load_first(x + i * m.channels, m.used)
                               : load(x + i * lanes);
        };
        added += (stop - i + ways - 1) / ways;
        for (; i + ways <= stop; i += ways) {
          for (int w = 0; w < ways; ++w) add(read(i + w) - centre, w);
        }
        for (; i < stop; ++i) add(read(i) - centre, 0);
        if (added >= terms) flush();
      }
      if (const int64_t left = pixels - vectors * step) {
        const First those{left, 0};
        const V v = vectors ? load(x + pixels - lanes) : load_first(x, left);
        add(vectors ? first_lanes<A>(lanes - left) ? V{} : v - centre : only<A>(v - centre, those), 1);
        if (++added >= terms) flush();
      }
    }
    flush();
  }

  // Add what the chains hold, and clear them.
  static void join(const M& m, V (&chains)[4], double* total) {
    A all[lanes];
    store(all, (chains[0] + chains[1]) + (chains[2] + chains[3]));
    std::fill_n(chains, 4, V{});
    if (!channels_last) *total += sum_of(all);
    else for (int c = 0; c < m.used; ++c) total[c] += all[c];
  }

  // Of samples n to n + samples, for each channel of the group.
  ONCE static void moments(const Sizes& size, const S* x, int64_t n, int64_t samples, int64_t channel, Moment* found) {
    const M m = map_of(size, channel);
    const int64_t sample_step = size.channels * size.pixels();
    const double count = static_cast<double>(samples * size.pixels());
    double sum[lanes] = {}, off[lanes] = {}, squares[lanes] = {};
    x += offset(size, n, channel);
    accumulate<false>(m, x, samples, sample_step, V{}, sum, nullptr);
    A first[lanes] = {};  // mean, whose own error the second sums correct
    for (int c = 0; c < m.used && c < group; ++c) first[c] = static_cast<A>(sum[c] / count);
    const V centre = channels_last ? load(first) : V{} + *first;
    accumulate<true>(m, x, samples, sample_step, centre, off, squares);
    for (int c = 0; c < m.used && c < group; ++c) {
      off[c] /= count;
      // The mean of an infinite map is no NaN.
      found[c] = {count, std::isinf(first[c]) ? first[c] : first[c] + off[c], squares[c] - off[c] * off[c] * count};
    }
  }

  // mean, var (N, C) of single samples, or (C,) over the batch; biased.
  static void moments(const Sizes& size, const S* x, bool over_batch, A* mean, A* var) {
    const int64_t samples = over_batch ? samples_of_a_task(size) : 1, parts = (size.batch + samples - 1) / samples;
    std::vector<Moment> found(parts * size.channels);
    each(size, parts, 0, [&](int64_t part, int64_t channel, A*) {
      const int64_t n = part * samples;
      moments(size, x, n, std::min(samples, size.batch - n), channel, &found[part * size.channels + channel]);
    });
    for (int64_t i = 0; i < (over_batch ? size.channels : parts * size.channels); ++i) {
      Moment all = found[i];
      for (int64_t part = 1; over_batch && part < parts; ++part) all.join(found[part * size.channels + i]);
      mean[i] = static_cast<A>(all.mean);
      var[i] = static_cast<A>(all.squares / all.count);
    }
  }

  // --- Forward

  // Numbers that go with the channels; those of statistics may differ by sample.
  struct Numbers {
    const A *mean, *rstd;
    int64_t sample_step;
    const A *weight, *bias;
  };

  template <int K>
  ONCE static void forward_part(const Sizes& size, const S* x, const Numbers& numbers, const S* residual, bool relu, S* y,
                           int64_t n, int64_t samples, int64_t channel, A* scratch) {
    typedef Kernel<S, A, channels_last, K> kernel;
    const M m = map_of(size, channel);
    typename kernel::Transform how;
    kernel::spread_taps(numbers.weight + channel * K * K, m.used, false, how.taps);
    how.start = kernel::spread(numbers.bias + channel, m.used);
    how.scale = V{} + A(1), how.centre = V{}, how.relu = relu;
    for (; samples; ++n, --samples) {
      const int64_t at = offset(size, n, channel), c = n * numbers.sample_step + channel;
      const Normalised<S, A> source{x + at, kernel::spread(numbers.mean + c, m.used), kernel::spread(numbers.rstd + c, m.used)};
      kernel::transform(m, source, residual ? residual + at : nullptr, how, y + at, scratch);
    }
  }

  template <int K>
  static void forward(const Sizes& size, const S* x, const Numbers& numbers, const S* residual, bool relu, S* y) {
    each(size, size.batch, Kernel<S, A, channels_last, K>::ring_size(size.width),
         [&](int64_t n, int64_t channel, A* scratch) {
           forward_part<K>(size, x, numbers, residual, relu, y, n, 1, channel, scratch);
         });
  }

  // The running statistics of a batch norm, `step` apart; null for none.
  struct Running {
    A *mean, *var;
    int64_t mean_step, var_step;
    double momentum, eps;
  };

  // forward() with the statistics of x, which go to mean and rstd (C,) and move the running ones.
  template <int K>
  static void norm(const Sizes& size, const S* x, const Running& running, A* mean, A* rstd, const A* weight,
                   const A* bias, const S* residual, bool relu, S* y) {
    const int64_t samples = samples_of_a_task(size), parts = (size.batch + samples - 1) / samples;
    std::vector<Moment> found(parts * size.channels);
    const auto number_of = [&](int64_t part) { return std::min(samples, size.batch - part * samples); };
    each(size, parts, Kernel<S, A, channels_last, K>::ring_size(size.width),
      [&](int64_t part, int64_t channel, A*) {
        moments(size, x, part * samples, number_of(part), channel, &found[part * size.channels + channel]);
      },
      [&](int64_t channel) {
        for (int64_t c = channel; c < std::min(channel + group, size.channels); ++c) {
          Moment all = found[c];
          for (int64_t part = 1; part < parts; ++part) all.join(found[part * size.channels + c]);
          mean[c] = static_cast<A>(all.mean);
          rstd[c] = static_cast<A>(1 / std::sqrt(all.squares / all.count + running.eps));
          const auto move = [&](A* value, double to) {
            *value = static_cast<A>((1 - running.momentum) * *value + running.momentum * to);
          };
          if (running.mean) move(running.mean + c * running.mean_step, all.mean);
          if (running.var) move(running.var + c * running.var_step, all.squares / (all.count - 1));
        }
      },
      [&](int64_t part, int64_t channel, A* scratch) {
        const Numbers numbers{mean, rstd, 0, weight, bias};
        forward_part<K>(size, x, numbers, residual, relu, y, part * samples, number_of(part), channel, scratch);
      });
  }

  // --- Backward

  // What goes into the backward pass, and the gradients of what goes with the channels that come out: grad_weight
  // (C, K * K), grad_bias (C,), and the sums of g^ and of g^ * x^, (C,) or (N, C) as the statistics; g^ is the gradient
  // of x^.
  struct Gradients {
    const S *grad, *y;  // y: where a ReLU has made it
    S* grad_residual;   // or null
    A *weight, *bias;
    double *sum, *product;
  };

  // grad_x = rstd * (g^ - mean(g^) - x^ * mean(g^ * x^)), the means only for `batch_statistics`; G is its stored type.
  template <int K, typename G>
  static void backward(const Sizes& size, const S* x, const Numbers& numbers, const Gradients& gradients,
                       bool batch_statistics, bool needs_weight, bool needs_statistics, G* grad_x) {
    typedef Kernel<S, A, channels_last, K> kernel;
    constexpr int count = kernel::count;
    const int64_t samples = numbers.sample_step ? 1 : samples_of_a_task(size);
    const int64_t parts = (size.batch + samples - 1) / samples;
    const double values = static_cast<double>(size.batch * size.pixels());
    std::vector<double> sums(parts * size.channels * count);
    needs_statistics |= batch_statistics;

    const auto first = [&](int64_t part, int64_t channel, A* scratch) {
      const M m = map_of(size, channel);
      typename kernel::Sums found{scratch + kernel::sums_scratch(size.width) - count * lanes,
                                  &sums[(part * size.channels + channel) * count], m.used, 0};
      for (int64_t n = part * samples; n < std::min((part + 1) * samples, size.batch); ++n) {
        const int64_t at = offset(size, n, channel), c = n * numbers.sample_step + channel;
        const Normalised<S, A> normalised{x + at, kernel::spread(numbers.mean + c, m.used),
                                          kernel::spread(numbers.rstd + c, m.used)};
        kernel::sums(m, normalised, gradient(gradients, at), needs_weight || needs_statistics, needs_statistics, found,
                     scratch);
      }
      found.flush();
    };

    const auto join = [&](int64_t channel) {
      for (int64_t c = channel; c < std::min(channel + group, size.channels); ++c) {
        double all[count] = {};
        for (int64_t part = 0; part < parts; ++part) {
          const double* found = &sums[(part * size.channels + c) * count];
          for (int s = 0; s < count; ++s) all[s] += found[s];
          if (numbers.sample_step && needs_statistics) statistics<K>(size, found, numbers, gradients, part * size.channels + c, c);
        }
        for (int t = 0; t < K * K; ++t) gradients.weight[c * K * K + t] = static_cast<A>(all[t]);
        gradients.bias[c] = static_cast<A>(all[K * K]);
        if (!numbers.sample_step && needs_statistics) statistics<K>(size, all, numbers, gradients, c, c);
      }
    };

    const auto second = [&](int64_t part, int64_t channel, A* scratch) {
      const M m = map_of(size, channel);
      typename kernel::Transform how;
      V taps[K * K];
      kernel::spread_taps(numbers.weight + channel * K * K, m.used, true, taps);
      how.start = how.scale = how.centre = V{}, how.relu = false;
      for (int64_t n = part * samples; n < std::min((part + 1) * samples, size.batch); ++n) {
        const int64_t at = offset(size, n, channel), c = n * numbers.sample_step + channel;
        const V rstd = kernel::spread(numbers.rstd + c, m.used);
        for (int t = 0; t < K * K; ++t) how.taps[t] = rstd * taps[t];
        if (batch_statistics) {
          A shift[lanes] = {}, slope[lanes] = {};
          for (int64_t i = 0; i < std::min<int64_t>(m.used, group); ++i) {
            const double scale = numbers.rstd[c + i];
            shift[i] = static_cast<A>(-scale * (gradients.sum[c + i] / values));
            slope[i] = static_cast<A>(-scale * scale * (gradients.product[c + i] / values));
          }
          how.start = kernel::spread(shift, m.used), how.scale = kernel::spread(slope, m.used);
          how.centre = kernel::spread(numbers.mean + c, m.used);
        }
        auto source = gradient(gradients, at);
        source.masked = nullptr;  // written by the first step
        kernel::transform(m, source, batch_statistics ? x + at : nullptr, how, grad_x + at, scratch);
      }
    };

    const int64_t scratch_size = kernel::sums_scratch(size.width);
    if (batch_statistics) {
      each(size, parts, scratch_size, first, join, second);
      return;
    }
    each(size, parts, scratch_size, [&](int64_t part, int64_t channel, A* scratch) {
      first(part, channel, scratch);
      second(part, channel, scratch);
    });
    for (int64_t channel = 0; channel < size.channels; channel += group) join(channel);
  }

  static Gradient<S, A> gradient(const Gradients& gradients, int64_t at) {
    return {gradients.grad + at, gradients.y ? gradients.y + at : nullptr,
            gradients.grad_residual ? gradients.grad_residual + at : nullptr};
  }

  // Number `to` of the sums of g^ and g^ * x^, which are linear in the taps, from those of channel c.
  template <int K>
  static void statistics(const Sizes& size, const double* sums, const Numbers& numbers, const Gradients& gradients,
                         int64_t to, int64_t c) {
    double seen[K * K], sum = 0, product = 0;
    Kernel<S, A, channels_last, K>::windows(sums, size.height, size.width, seen);
    for (int t = 0; t < K * K; ++t) {
      sum += numbers.weight[c * K * K + t] * seen[t];
      product += numbers.weight[c * K * K + t] * sums[t];
    }
    gradients.sum[to] = sum, gradients.product[to] = product;
  }

  // grad_x = grad + shift + scale * (x - mean); the numbers (N, C) with stride sample_stride. `grad` is of type A, or
  // grad_x itself.
  template <typename G>
  static void add_moments(const Sizes& size, const G* grad, S* grad_x, const S* x, const A* mean, const A* shift,
                          const A* scale, int64_t sample_stride) {
    if (!channels_last) {
      each(size, size.batch, 0, [&](int64_t n, int64_t c, A*) {
        const int64_t i = n * sample_stride + c;
        const A m = mean[i], b = shift[i], a = scale[i];
        const auto add = [&](int64_t p, auto those) {
          store(grad_x + p, load(grad + p, those) + (b + a * (load(x + p, those) - m)), those);
        };
        int64_t p = offset(size, n, c);
        const int64_t end = p + size.pixels();
        for (; p + lanes <= end; p += lanes) add(p, All());
        if (p < end) add(p, First{end - p, 0});
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

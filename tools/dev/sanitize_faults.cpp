// A fault of each kind that sanitize.sh looks for, as an operator, to show that it would be found. And, for
// ThreadSanitizer, a stand-in for OpenMP's runtime: the real one is not instrumented, so that every join of its threads
// would look like a race; this one makes threads by std::thread, which the sanitizer understands.

#include <cstdint>
#include <limits>
#include <thread>
#include <vector>

#include <ATen/ATen.h>
#include <torch/library.h>

namespace {

void overrun(const at::Tensor& x) {
  volatile float* data = x.mutable_data_ptr<float>();
  data[x.numel()] = 1;
}

void use_after_free(const at::Tensor& x) {
  volatile float* data;
  {
    const auto copy = x.clone();
    data = copy.mutable_data_ptr<float>();
  }
  data[0] = 1;
}

void signed_overflow(const at::Tensor& x) {
  volatile int64_t most = std::numeric_limits<int64_t>::max();
  volatile int64_t more = most + x.numel();
  (void)more;
}

void data_race(const at::Tensor& x) {
  float* const data = x.mutable_data_ptr<float>();
  const auto add = [data] { for (int i = 0; i < 1000; ++i) data[0] += 1; };
  std::thread one(add), other(add);
  one.join();
  other.join();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(bnet_mm, m) {
  m.def("fault_overrun(Tensor x) -> ()", overrun);
  m.def("fault_use_after_free(Tensor x) -> ()", use_after_free);
  m.def("fault_signed_overflow(Tensor x) -> ()", signed_overflow);
  m.def("fault_data_race(Tensor x) -> ()", data_race);
}

#ifdef BNET_MM_OWN_THREADS
// What g++ calls for `#pragma omp parallel` and ATen/Parallel.h beside it; -Bsymbolic makes the kernels find these.
namespace {
constexpr int threads = 4;
thread_local int number = 0, team = 1;
}  // namespace

extern "C" {
int omp_get_num_threads() { return team; }
int omp_get_thread_num() { return number; }
int omp_get_max_threads() { return threads; }
int omp_in_parallel() { return team > 1; }
void GOMP_parallel(void (*function)(void*), void* data, unsigned, unsigned) {
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) {
    others.emplace_back([=] {
      number = i;
      team = threads;
      function(data);
    });
  }
  team = threads;
  function(data);
  team = 1;
  for (auto& other : others) other.join();
}
}
#endif

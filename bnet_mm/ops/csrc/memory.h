#pragma once

#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>

namespace bnet_mm {

// The memory of large maps, reused from call to call. glibc's malloc returns every block above 32 MiB to the system when
// it is freed, and smaller ones with the top of its heap whenever that grows; torch's CPU allocator keeps nothing. The
// page faults of a fresh map take longer than the kernels that fill it.
//
// An allocator, so that tensors can be resized as any other. Older torch declares allocate const, and has no copy_data:
// what fits overrides, hence no `override`.
class LargeMaps : public c10::Allocator {
 public:
  static constexpr size_t from = size_t(4) << 20;    // bytes; smaller maps are torch's allocator's
  static constexpr size_t kept = size_t(256) << 20;  // bytes held at most while no tensor uses them

  // Like at::empty_like for a dense x.
  static at::Tensor empty_like(const at::Tensor& x, at::ScalarType dtype) {
    if (x.numel() * c10::elementSize(dtype) <= from) return at::empty_like(x, x.options().dtype(dtype));
    const c10::DispatchKeySet cpu(c10::DispatchKey::CPU);
    return at::Tensor(at::detail::empty_strided_generic(x.sizes(), x.strides(), &instance(), cpu, dtype));
  }

  c10::DataPtr allocate(size_t bytes) {
    if (bytes <= from) return at::getCPUAllocator()->allocate(bytes);
    auto block = std::make_unique<Block>(take(bytes));
    void* const data = block->data.get();
    return {data, block.release(), give_back, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DataPtr allocate(size_t bytes) const { return instance().allocate(bytes); }
  void copy_data(void* to, const void* from, size_t bytes) const { std::memcpy(to, from, bytes); }

  // Bytes that no tensor uses.
  static int64_t held() {
    const std::lock_guard<std::mutex> lock(instance().mutex_);
    return instance().held_;
  }

 private:
  struct Block {
    size_t bytes;
    c10::DataPtr data;
  };

  // Never destroyed: a tensor may outlive every static object.
  static LargeMaps& instance() {
    static auto* const maps = new LargeMaps;
    return *maps;
  }

  static void give_back(void* context) {
    const std::unique_ptr<Block> block(static_cast<Block*>(context));
    instance().give(std::move(*block));
  }

  // The smallest block that is large enough and at most half as large again.
  Block take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = free_.end();
      for (auto b = free_.begin(); b != free_.end(); ++b) {
        if (b->bytes >= bytes && b->bytes <= bytes + bytes / 2 && (best == free_.end() || b->bytes < best->bytes)) best = b;
      }
      if (best != free_.end()) {
        Block block = std::move(*best);
        free_.erase(best);
        held_ -= block.bytes;
        return block;
      }
    }
    return {bytes, at::getCPUAllocator()->allocate(bytes)};
  }

  void give(Block block) {
    if (block.bytes > kept) return;
    std::vector<Block> dropped;  // freed after the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    held_ += block.bytes;
    free_.push_back(std::move(block));
    while (held_ > kept) {  // the oldest first
      held_ -= free_.front().bytes;
      dropped.push_back(std::move(free_.front()));
      free_.erase(free_.begin());
    }
  }

  std::mutex mutex_;
  std::vector<Block> free_;  // in the order in which they came back
  size_t held_ = 0;          // bytes in free_
};

}  // namespace bnet_mm

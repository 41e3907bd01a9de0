#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include <ATen/ATen.h>

namespace bnet_mm {

// The memory of large maps, reused from call to call. glibc's malloc returns every block above 32 MiB to the system when
// it is freed, and torch's CPU allocator keeps nothing: the page faults of a fresh map of that size take longer than the
// kernels that fill it.
class LargeMaps {
 public:
  static constexpr size_t from = size_t(32) << 20;   // bytes; smaller maps are malloc's
  static constexpr size_t kept = size_t(256) << 20;  // bytes held at most while no tensor uses them

  // Like at::empty_like.
  static at::Tensor empty_like(const at::Tensor& x) {
    if (x.nbytes() <= from) return at::empty_like(x);
    auto block = std::make_unique<Block>(instance().take(x.nbytes()));
    void* const data = block->data.get();
    c10::Storage storage({}, x.nbytes(), c10::DataPtr(data, block.release(), give_back, x.device()), nullptr, false);
    return at::empty({0}, x.options()).set_(storage, 0, x.sizes(), x.strides());
  }

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

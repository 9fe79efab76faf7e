// Which pieces of a memory are free. First fit at the lowest address, so that pages that were used before are used
// again.
#pragma once
#include <cstddef>
#include <iterator>
#include <map>

namespace expertd {

class Pieces {
 public:
  explicit Pieces(std::ptrdiff_t num_bytes = 0) {
    if (num_bytes) free_[0] = num_bytes;
  }

  // Where so many bytes start that are nobody else's from now on; -1: no free piece is as large.
  std::ptrdiff_t take(std::ptrdiff_t num_bytes) {
    for (auto piece = free_.begin(); piece != free_.end(); ++piece) {
      const auto [start, room] = *piece;
      if (room < num_bytes) continue;
      const auto next = free_.erase(piece);
      if (room > num_bytes) free_.emplace_hint(next, start + num_bytes, room - num_bytes);
      return start;
    }
    return -1;
  }

  void release(std::ptrdiff_t start, std::ptrdiff_t num_bytes) {
    auto next = free_.lower_bound(start);
    if (next != free_.end() && next->first == start + num_bytes) {
      num_bytes += next->second;
      next = free_.erase(next);
    }
    if (next != free_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == start) {
        before->second += num_bytes;
        return;
      }
    }
    free_.emplace_hint(next, start, num_bytes);
  }

  std::ptrdiff_t free_bytes() const {
    std::ptrdiff_t total = 0;
    for (const auto& [start, num_bytes] : free_) total += num_bytes;
    return total;
  }

 private:
  std::map<std::ptrdiff_t, std::ptrdiff_t> free_;  // bytes by where they start; no two of them touch
};

}  // namespace expertd

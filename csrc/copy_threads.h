// Threads that help with copies of host memory too large for one: a core copies at a fraction of what memory can do.
#pragma once
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "any_core.h"

namespace expertd {

struct Span {
  uint8_t* to;
  const uint8_t* from;
  size_t num_bytes;
};

class CopyThreads {
 public:
  static constexpr size_t kWorthWhile = 512 << 10;  // waking somebody takes as long as copying a tenth of this

  // Of this process. Never destroyed: its threads may wait in there while the process ends.
  static CopyThreads& shared() {
    static auto* threads = new CopyThreads();
    return *threads;
  }

  // How many help at most; those that were started before stay, and sleep.
  void set_helpers(unsigned count) {
    std::lock_guard<std::mutex> lock(lock_);
    num_helpers_ = count;
  }

  // Does all copies; the caller does what the others leave. One caller at a time has help.
  void copy(std::vector<Span> spans) {
    std::unique_lock<std::mutex> mine(callers_, std::try_to_lock);
    if (num_helpers_ == 0 || !mine.owns_lock()) {
      for (const Span& span : spans) std::memcpy(span.to, span.from, span.num_bytes);
      return;
    }
    const auto job = std::make_shared<Job>(cut(std::move(spans)));
    {
      std::lock_guard<std::mutex> lock(lock_);
      start_helpers();
      job_ = job;
      ++num_jobs_;
    }
    wake_.notify_all();
    job->help();
    while (job->num_done.load(std::memory_order_acquire) < job->pieces.size()) std::this_thread::yield();
  }

 private:
  static constexpr size_t kPieceBytes = 128 << 10;
  static constexpr unsigned kMaxHelpers = 3, kCoresPerThread = 4;

  struct Job {
    explicit Job(std::vector<Span> all) : pieces(std::move(all)) {}

    void help() {
      for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < pieces.size();) {
        std::memcpy(pieces[i].to, pieces[i].from, pieces[i].num_bytes);
        num_done.fetch_add(1, std::memory_order_release);
      }
    }

    const std::vector<Span> pieces;
    std::atomic<size_t> next{0}, num_done{0};
  };

  CopyThreads() {
    cpu_set_t cores;
    const unsigned num_cores = cores_of_process(&cores) ? CPU_COUNT(&cores) : 1;
    num_helpers_ = std::min(kMaxHelpers, num_cores / kCoresPerThread);
  }

  static std::vector<Span> cut(std::vector<Span> spans) {
    std::vector<Span> pieces;
    for (Span span : spans) {
      for (; span.num_bytes > kPieceBytes; span.num_bytes -= kPieceBytes) {
        pieces.push_back({span.to, span.from, kPieceBytes});
        span.to += kPieceBytes, span.from += kPieceBytes;
      }
      if (span.num_bytes) pieces.push_back(span);
    }
    return pieces;
  }

  // With the lock; not before there is something to do. Where the system has no thread left those that there are help,
  // and the next copy tries again.
  void start_helpers() {
    try {
      for (; num_started_ < num_helpers_; ++num_started_) std::thread([this] { run(); }).detach();
    } catch (const std::system_error&) {
    }
  }

  void run() {
    run_on_any_core();
    uint64_t seen = 0;
    while (true) {
      std::shared_ptr<Job> job;
      {
        std::unique_lock<std::mutex> lock(lock_);
        wake_.wait(lock, [&] { return num_jobs_ != seen; });
        seen = num_jobs_;
        job = job_;
      }
      job->help();
    }
  }

  std::atomic<unsigned> num_helpers_;
  unsigned num_started_ = 0;
  std::mutex callers_, lock_;
  std::condition_variable wake_;
  std::shared_ptr<Job> job_;
  uint64_t num_jobs_ = 0;
};

}  // namespace expertd

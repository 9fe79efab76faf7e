// Says how far a batch is: threads that wait for the device and then write to a file, which another thread reads.
// They have no use for the interpreter, whose lock a thread of Python's would have to wait for, and keep others
// waiting.
#pragma once
#include <cuda_runtime.h>
#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "any_core.h"

namespace expertd {

struct DestroyEvent {
  void operator()(cudaEvent_t event) const { cudaEventDestroy(event); }
};

// A copy of somebody's eventfd, which stays open when theirs is closed and its number another file's.
class BellFile {
 public:
  explicit BellFile(int fd) : fd_(fcntl(fd, F_DUPFD_CLOEXEC, 0)) {
    if (fd_ < 0) throw std::system_error(errno, std::generic_category(), "copying the file of a bell");
  }
  ~BellFile() { close(fd_); }
  BellFile(const BellFile&) = delete;
  BellFile& operator=(const BellFile&) = delete;

  void ring() const {
    const uint64_t one = 1;
    (void)!write(fd_, &one, sizeof(one));  // fails where it has been rung 2^64 - 2 times and was not heard
  }

 private:
  int fd_;
};

// An event that is recorded for one batch after the other, and of which it is now.
struct BatchEvent {
  std::unique_ptr<CUevent_st, DestroyEvent> event;
  int device = 0;
  std::atomic<uint64_t> batch{0};
};

class Ringer {
 public:
  // Of this process, for the end of computing and for that of the copies behind it: each comes in the order of the
  // batches, but not the one before the other. Never destroyed: their threads wait in there while the process ends.
  static Ringer& of_computing() {
    static auto* ringer = new Ringer();
    return *ringer;
  }
  static Ringer& of_answers() {
    static auto* ringer = new Ringer();
    return *ringer;
  }

  // Rings when the batch that the last of these events was recorded for last is over, or has failed. They come one
  // after the other. In the order of these calls.
  void ring_after(const std::vector<std::shared_ptr<const BatchEvent>>& events, std::shared_ptr<const BellFile> bell) {
    Due due = {{}, std::move(bell)};
    for (const auto& event : events) due.moments.push_back({event, event->batch.load()});
    {
      std::lock_guard<std::mutex> lock(lock_);
      if (!is_started_) std::thread(&Ringer::run, this).detach();
      is_started_ = true;
      due_.push_back(std::move(due));
    }
    wake_.notify_one();
  }

 private:
  struct Moment {
    std::shared_ptr<const BatchEvent> event;
    uint64_t batch;
  };

  struct Due {
    std::vector<Moment> moments;
    std::shared_ptr<const BellFile> bell;
  };

  void run() {
    run_on_any_core();
    int device = -1;
    while (true) {
      const Due due = next();
      for (const auto& [event, batch] : due.moments) {
        if (event->device != device) (void)cudaSetDevice(device = event->device);
        // Where somebody else saw that it was over, the event may be of a later batch, which has a call of its own.
        if (event->batch.load() == batch) (void)cudaEventSynchronize(event->event.get());
      }
      due.bell->ring();  // an error is the end as well: whoever hears it asks, and is told
    }
  }

  Due next() {
    std::unique_lock<std::mutex> lock(lock_);
    wake_.wait(lock, [this] { return !due_.empty(); });
    Due due = std::move(due_.front());
    due_.pop_front();
    return due;
  }

  std::mutex lock_;
  std::condition_variable wake_;
  std::deque<Due> due_;  // no more than there are slots
  bool is_started_ = false;
};

}  // namespace expertd

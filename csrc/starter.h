// Starts batches on the device in place of the thread that serves: some ten calls of CUDA and one more for each
// request, a fifth of what that thread does for a batch. It has no use for the interpreter.
#pragma once
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

#include "any_core.h"

namespace expertd {

class Starter {
 public:
  // Of this process. Never destroyed: its thread waits in there while the process ends.
  static Starter& shared() {
    static auto* starter = new Starter();
    return *starter;
  }

  // Do it soon, after all that was posted before. It must not throw.
  void post(std::function<void()> job) {
    {
      std::lock_guard<std::mutex> lock(lock_);
      if (!is_started_) std::thread(&Starter::run, this).detach();
      is_started_ = true;
      due_.push_back(std::move(job));
      ++num_left_;
    }
    wake_.notify_one();
  }

  bool is_idle() const {
    std::lock_guard<std::mutex> lock(lock_);
    return num_left_ == 0;
  }

  // Return when all that was posted is done. Not while holding what a job may wait for: the interpreter's lock.
  void drain() const {
    std::unique_lock<std::mutex> lock(lock_);
    idle_.wait(lock, [this] { return num_left_ == 0; });
  }

  // Held while something is started that uses the scratch memory that graphs share. What starts in several steps must
  // not have a graph between them.
  std::mutex& submitting() { return submitting_; }

 private:
  void run() {
    run_on_any_core();
    std::unique_lock<std::mutex> lock(lock_);
    while (true) {
      wake_.wait(lock, [this] { return !due_.empty(); });
      {
        const std::function<void()> job = std::move(due_.front());
        due_.pop_front();
        lock.unlock();
        job();
        lock.lock();
      }
      if (--num_left_ == 0) idle_.notify_all();
    }
  }

  mutable std::mutex lock_;
  std::condition_variable wake_;
  mutable std::condition_variable idle_;
  std::deque<std::function<void()>> due_;  // no more than there are slots
  int num_left_ = 0;                       // due, and the one that is being done
  bool is_started_ = false;
  std::mutex submitting_;
};

}  // namespace expertd

// What a batch asks of CUDA besides kernels: the copies in and out, the launch of its graph, and the order between
// them. Asking for each event and stream from Python takes longer than a small layer computes.
#include "slot.h"

#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "address.h"
#include "check.h"
#include "packed_span.h"
#include "ringer.h"
#include "starter.h"

namespace py = pybind11;

namespace expertd {
namespace {

struct DestroyGraph {
  void operator()(cudaGraphExec_t graph) const { cudaGraphExecDestroy(graph); }
};

// An executable copy of a captured graph, which remains the caller's. What it was captured on must outlive it.
class Graph {
 public:
  explicit Graph(Address captured) {
    cudaGraphExec_t graph;
    check_cuda(cudaGraphInstantiate(&graph, pointer<CUgraph_st>(captured), 0), "instantiating a CUDA graph");
    graph_.reset(graph);
  }

  void launch(Address stream) const { launch(pointer<CUstream_st>(stream)); }

  void launch(cudaStream_t stream) const {
    check_cuda(cudaGraphLaunch(graph_.get(), stream), "launching a CUDA graph");
  }

 private:
  std::unique_ptr<CUgraphExec_st, DestroyGraph> graph_;
};

// What one copy moves: where in the slot, how many bytes, and the address of the host's end; 0: at the same place in
// the slot's host memory. See spans.py.
using Spans = std::vector<std::tuple<size_t, size_t, Address>>;

std::vector<PackedSpan> each_of(const Spans& spans) {
  std::vector<PackedSpan> each;
  each.reserve(spans.size());
  for (const auto& [offset, num_bytes, host] : spans) {
    each.push_back({static_cast<int64_t>(offset), static_cast<int64_t>(num_bytes), host});
  }
  return each;
}

std::vector<PackedSpan> each_of(const py::bytes& packed) {
  char* start;
  py::ssize_t num_bytes;
  if (PyBytes_AsStringAndSize(packed.ptr(), &start, &num_bytes) < 0) throw py::error_already_set();
  if (num_bytes % static_cast<py::ssize_t>(sizeof(PackedSpan)) != 0) {
    throw py::value_error("packed spans have " + std::to_string(num_bytes) + " bytes, expected a multiple of 24");
  }
  std::vector<PackedSpan> each(static_cast<size_t>(num_bytes) / sizeof(PackedSpan));
  std::memcpy(each.data(), start, static_cast<size_t>(num_bytes));
  return each;
}

// Copies between host and device that are started together.
class DeviceCopies {
 public:
  void clear() { to_.clear(), from_.clear(), num_bytes_.clear(); }

  void add(Address to, Address from, size_t num_bytes) {
    if (num_bytes == 0) return;
    to_.push_back(pointer<void>(to));
    from_.push_back(pointer<void>(from));
    num_bytes_.push_back(num_bytes);
  }

  void start(cudaStream_t stream) {
    const size_t count = to_.size();
#if CUDART_VERSION >= 13000
    if (count > 1) {  // a third of the time of as many calls, and the device leaves no gaps between
      cudaMemcpyAttributes attributes = {};
      attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
      size_t first = 0;
      check_cuda(
          cudaMemcpyBatchAsync(to_.data(), from_.data(), num_bytes_.data(), count, &attributes, &first, 1, stream),
          "copying between host and device");
      return;
    }
#endif
    for (size_t n = 0; n < count; ++n) {
      check_cuda(cudaMemcpyAsync(to_[n], from_[n], num_bytes_[n], cudaMemcpyDefault, stream),
                 "copying between host and device");
    }
  }

 private:
  std::vector<void*> to_;
  std::vector<const void*> from_;
  std::vector<size_t> num_bytes_;
};

// Wait until the Starter has started all that it was told to, so that what comes now comes after it.
void await_starter() {
  if (Starter::shared().is_idle()) return;
  py::gil_scoped_release release;
  Starter::shared().drain();
}

// One batch after the other on three streams: send, begin, what computes, end, fetch, wait; or start, wait.
class SlotWork {
 public:
  SlotWork(Address copy_in, Address compute, Address copy_out)
      : copy_in_(pointer<CUstream_st>(copy_in)),
        compute_(pointer<CUstream_st>(compute)),
        copy_out_(pointer<CUstream_st>(copy_out)) {
    for (auto& owner : events_) owner.reset(new_event());
    // Another batch computes then, so nobody is kept waiting by a thread that sleeps until it is told.
    computed_->event.reset(new_event(cudaEventBlockingSync));
    fetched_->event.reset(new_event());
    int device;
    check_cuda(cudaGetDevice(&device), "asking for the CUDA device");
    computed_->device = fetched_->device = device;
  }

  ~SlotWork() { Starter::shared().drain(); }
  SlotWork(const SlotWork&) = delete;
  SlotWork& operator=(const SlotWork&) = delete;

  // Where batches lie, from the next one on.
  void place(Address host_in, Address device_in, Address device_out, Address host_out) {
    host_in_ = host_in, device_in_ = device_in, device_out_ = device_out, host_out_ = host_out;
  }

  template <typename AnySpans>
  void send(const AnySpans& spans) {
    await_starter();
    error_.clear();
    send(each_of(spans));
  }

  void begin() { record(kStarted, compute_); }

  void end() {
    ++computed_->batch;
    check_cuda(cudaEventRecord(computed_->event.get(), compute_), "recording a CUDA event");
  }

  template <typename AnySpans>
  void fetch(const AnySpans& spans) {
    fetch(each_of(spans));
  }

  // Have the Starter send, launch the graph and fetch. What went wrong then is told by what waits.
  template <typename Sent, typename Fetched>
  void start(const Sent& sent, std::shared_ptr<const Graph> graph, const Fetched& fetched) {
    sent_ = each_of(sent);
    fetched_spans_ = each_of(fetched);
    {
      std::lock_guard<std::mutex> lock(lock_);
      is_queued_ = true;
      error_.clear();
    }
    Starter::shared().post([this, graph = std::move(graph)] { start_here(*graph); });
  }

  void wait() const {
    await_start(std::nullopt);
    check_cuda(cudaEventSynchronize(fetched_->event.get()), "waiting for a batch");
  }

  // Whether the device is through with computing the batch that was fetched or started last.
  bool is_computed() const {
    if (!await_start(std::chrono::steady_clock::time_point{})) return false;
    const cudaError_t status = cudaEventQuery(computed_->event.get());
    if (status != cudaErrorNotReady) {
      check_cuda(status, "asking for a batch");
      return true;
    }
    (void)cudaGetLastError();  // "not ready" is none
    return false;
  }

  // Write to an eventfd when the batch that was fetched or started last is computed, and when it is over.
  void ring_when_done(int eventfd) {
    if (eventfd != bell_fd_) {
      bell_ = std::make_shared<const BellFile>(eventfd);
      bell_fd_ = eventfd;
    }
    std::lock_guard<std::mutex> lock(lock_);
    if (is_queued_) {
      is_bell_due_ = true;
    } else {
      ring();
    }
  }

  // Whether the batch is over, or is so within so long. Looks all the time, as wait does.
  bool is_done_within(double seconds) const {
    const auto until =
        std::chrono::steady_clock::now() +
        std::chrono::duration_cast<std::chrono::steady_clock::duration>(std::chrono::duration<double>(seconds));
    if (!await_start(until)) return false;
    while (true) {
      const cudaError_t status = cudaEventQuery(fetched_->event.get());
      if (status != cudaErrorNotReady) {
        check_cuda(status, "waiting for a batch");
        return true;
      }
      (void)cudaGetLastError();  // "not ready" is none
      if (std::chrono::steady_clock::now() >= until) return false;
    }
  }

  // Seconds: copy in, wait, compute, copy out.
  py::tuple times() const {
    const std::array<cudaEvent_t, 5> events = {events_[kBegun].get(), events_[kSent].get(), events_[kStarted].get(),
                                               computed_->event.get(), fetched_->event.get()};
    std::array<double, 4> seconds;
    for (size_t i = 0; i < seconds.size(); ++i) {
      float ms = 0.0f;
      check_cuda(cudaEventElapsedTime(&ms, events[i], events[i + 1]), "reading a batch's times");
      seconds[i] = ms / 1e3;
    }
    return py::make_tuple(seconds[0], seconds[1], seconds[2], seconds[3]);
  }

 private:
  enum Event { kBegun, kSent, kStarted, kNumEvents };

  void send(const std::vector<PackedSpan>& spans) {
    record(kBegun, copy_in_);
    copies_.clear();
    for (const PackedSpan& span : spans) {
      copies_.add(device_in_ + span.start, span.address ? span.address : host_in_ + span.start, span.num_bytes);
    }
    copies_.start(copy_in_);
    record(kSent, copy_in_);
    order(kSent, compute_);
  }

  void fetch(const std::vector<PackedSpan>& spans) {
    check_cuda(cudaStreamWaitEvent(copy_out_, computed_->event.get(), 0), "ordering CUDA streams");
    copies_.clear();
    for (const PackedSpan& span : spans) {
      copies_.add(span.address ? span.address : host_out_ + span.start, device_out_ + span.start, span.num_bytes);
    }
    copies_.start(copy_out_);
    ++fetched_->batch;
    check_cuda(cudaEventRecord(fetched_->event.get(), copy_out_), "recording a CUDA event");
  }

  // For the Starter.
  void start_here(const Graph& graph) {
    std::string error;
    try {
      check_cuda(cudaSetDevice(fetched_->device), "choosing the CUDA device");
      send(sent_);
      begin();
      {
        std::lock_guard<std::mutex> turn(Starter::shared().submitting());
        graph.launch(compute_);
      }
      end();
      fetch(fetched_spans_);
    } catch (const std::exception& failure) {
      error = failure.what();
      // Whoever hears of it takes the slot for free.
      for (cudaStream_t stream : {copy_in_, compute_, copy_out_}) (void)cudaStreamSynchronize(stream);
    }
    std::lock_guard<std::mutex> lock(lock_);
    is_queued_ = false;
    error_ = error;
    started_.notify_all();
    if (is_bell_due_) ring();
    is_bell_due_ = false;
  }

  // Under the lock, when the batch was started, or could not be.
  void ring() {
    if (error_.empty()) {
      Ringer::of_computing().ring_after({computed_}, bell_);
      // Looking for the end of the copies takes a core, so the thread sleeps until they have begun.
      Ringer::of_answers().ring_after({computed_, fetched_}, bell_);
    } else {
      bell_->ring();
    }
  }

  // Whether the batch was started by then. Raises what kept it from being started.
  bool await_start(std::optional<std::chrono::steady_clock::time_point> until) const {
    std::unique_lock<std::mutex> lock(lock_);
    const auto was_started = [this] { return !is_queued_; };
    if (!until) {
      started_.wait(lock, was_started);
    } else if (!started_.wait_until(lock, *until, was_started)) {
      return false;
    }
    if (!error_.empty()) throw std::runtime_error(error_);
    return true;
  }

  // Waiting for it spins: a thread that sleeps instead wakes 10 to 30 us later, a fifth of a small batch.
  static cudaEvent_t new_event(unsigned flags = cudaEventDefault) {
    cudaEvent_t event;
    check_cuda(cudaEventCreateWithFlags(&event, flags), "making a CUDA event");
    return event;
  }

  void record(Event event, cudaStream_t stream) {
    check_cuda(cudaEventRecord(events_[event].get(), stream), "recording a CUDA event");
  }

  void order(Event event, cudaStream_t behind) {
    check_cuda(cudaStreamWaitEvent(behind, events_[event].get(), 0), "ordering CUDA streams");
  }

  DeviceCopies copies_;
  cudaStream_t copy_in_, compute_, copy_out_;
  Address host_in_ = 0, device_in_ = 0, device_out_ = 0, host_out_ = 0;
  std::array<std::unique_ptr<CUevent_st, DestroyEvent>, kNumEvents> events_;
  std::shared_ptr<BatchEvent> computed_ = std::make_shared<BatchEvent>();
  std::shared_ptr<BatchEvent> fetched_ = std::make_shared<BatchEvent>();
  std::shared_ptr<const BellFile> bell_;
  int bell_fd_ = -1;  // what bell_ is a copy of

  std::vector<PackedSpan> sent_, fetched_spans_;  // of a batch that is started elsewhere
  mutable std::mutex lock_;                       // for what follows
  mutable std::condition_variable started_;
  bool is_queued_ = false;
  bool is_bell_due_ = false;
  std::string error_;  // what went wrong when it was started
};

}  // namespace

void bind_slot(py::module_& m) {
  // NOTE: but for what waits, the interpreter's lock is kept. All of them together take some ten microseconds; a thread
  // that lets go of the lock may have to wait for it a thousand times as long.
  py::class_<Graph, std::shared_ptr<Graph>>(m, "Graph")
      .def(py::init<Address>(), py::arg("captured"))
      .def("launch", py::overload_cast<Address>(&Graph::launch, py::const_), py::arg("stream"));
  py::class_<SlotWork>(m, "SlotWork")
      .def(py::init<Address, Address, Address>(), py::arg("copy_in"), py::arg("compute"), py::arg("copy_out"))
      .def("place", &SlotWork::place, py::arg("host_in"), py::arg("device_in"), py::arg("device_out"),
           py::arg("host_out"))
      .def("send", &SlotWork::send<py::bytes>, py::arg("spans"))
      .def("send", &SlotWork::send<Spans>, py::arg("spans"))
      .def("begin", &SlotWork::begin)
      .def("end", &SlotWork::end)
      .def("fetch", &SlotWork::fetch<py::bytes>, py::arg("spans"))
      .def("fetch", &SlotWork::fetch<Spans>, py::arg("spans"))
      .def("start", &SlotWork::start<py::bytes, py::bytes>, py::arg("sent"), py::arg("graph"), py::arg("fetched"))
      .def("start", &SlotWork::start<Spans, Spans>, py::arg("sent"), py::arg("graph"), py::arg("fetched"))
      .def("wait", &SlotWork::wait, py::call_guard<py::gil_scoped_release>())
      .def("is_computed", &SlotWork::is_computed)
      .def("ring_when_done", &SlotWork::ring_when_done, py::arg("eventfd"))
      .def("is_done_within", &SlotWork::is_done_within, py::arg("seconds"), py::call_guard<py::gil_scoped_release>())
      .def("times", &SlotWork::times);
  m.def("begin_submitting", [] { Starter::shared().submitting().lock(); }, py::call_guard<py::gil_scoped_release>());
  m.def("end_submitting", [] { Starter::shared().submitting().unlock(); });
}

}  // namespace expertd

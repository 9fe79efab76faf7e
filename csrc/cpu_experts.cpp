// expertd_server._cpu_experts: the experts of a layer on CPUs with AVX-512 BF16, by AMX where they have it, from routed
// tokens to the output. Integers only: pointers are addresses of contiguous tensors; ownership, shapes and checks stay
// in Python. Everything here plans the work and shares it out among threads; the arithmetic is in the files beside it.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <immintrin.h>
#include <omp.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "cpu_experts_kernels.h"

namespace {

using namespace expertd::cpu_experts;

// ---- Support ----

constexpr int kNumUnits = 2;

// nullptr where this process can use the unit, else why not. Asks the kernel's permission for the tiles, without which
// they trap.
const char* find_support(Unit unit) {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512bf16")) return "the CPU has no AVX-512 BF16";
  if (!__builtin_cpu_supports("avx512vbmi")) return "the CPU has no AVX-512 VBMI";
  if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vl")) {
    return "the CPU has AVX-512 BF16, but not the BW, DQ and VL that go with it";
  }
  if (unit == Unit::kAvx512) return nullptr;
  if (!__builtin_cpu_supports("amx-tile") || !__builtin_cpu_supports("amx-bf16")) return "the CPU has no AMX";
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return "the kernel does not permit the use of AMX";
  return nullptr;
}

const char* why_unsupported(Unit unit) {
  static const char* const reasons[kNumUnits] = {find_support(Unit::kAmx), find_support(Unit::kAvx512)};
  return reasons[static_cast<int>(unit)];
}

// ---- Weights ----

int64_t packed_bytes(int64_t num_blocks, int64_t size) { return num_blocks * steps_of(size) * kStepBytes; }

int64_t gemm1_blocks(Activation activation, int64_t intermediate_size) {
  return steps_of(intermediate_size) * (is_gated(activation) ? 2 : 1);
}

int64_t gemm2_blocks(int64_t hidden_size) { return (hidden_size + kBlockRows - 1) / kBlockRows; }

// Where in a tile's packed bytes a code of row n of the weights and k of the step lies; see Expander.
int place_in_tile(int n, int k) {
  const int word = 2 * n + k % 2, tile_row = k / 2;
  return tile_row / 2 * kGroupBytes + word / 8 * 16 + tile_row % 2 * 8 + word % 8;
}

// Weights [rows, size] to blocks, in which row n of tile i is row_of(block, i, n) of the weights, or none (negative).
template <typename RowOf>
void pack_matrix(const uint8_t* weights, int64_t size, int64_t num_blocks, const RowOf& row_of, uint8_t* packed) {
  int places[kTileRows][kStep];
  for (int n = 0; n < kTileRows; ++n) {
    for (int k = 0; k < kStep; ++k) places[n][k] = place_in_tile(n, k);
  }
  std::memset(packed, 0, static_cast<size_t>(packed_bytes(num_blocks, size)));
  for (int64_t block = 0; block < num_blocks; ++block) {
    for (int64_t first = 0; first < size; first += kStep, packed += kStepBytes) {
      const int num_codes = static_cast<int>(std::min<int64_t>(kStep, size - first));
      for (int i = 0; i < 2; ++i) {
        for (int n = 0; n < kTileRows; ++n) {
          const int64_t row = row_of(block, i, n);
          if (row < 0) continue;
          const uint8_t* from = weights + row * size + first;
          for (int k = 0; k < num_codes; ++k) packed[i * kTileElements + places[n][k]] = from[k];
        }
      }
    }
  }
}

struct Shape {
  int64_t hidden_size, intermediate_size;
  Activation activation;

  int64_t gemm1_bytes() const { return packed_bytes(gemm1_blocks(activation, intermediate_size), hidden_size); }
  int64_t gemm2_bytes() const { return packed_bytes(gemm2_blocks(hidden_size), intermediate_size); }
};

void pack_expert(const Shape& shape, const uint8_t* gemm1, const uint8_t* gemm2, uint8_t* packed1, uint8_t* packed2) {
  const int64_t columns = shape.intermediate_size;
  const bool gated = is_gated(shape.activation);
  const auto gemm1_row = [=](int64_t block, int tile, int n) -> int64_t {
    const int64_t column = gated ? block * kGatedColumns + n : block * kBlockRows + tile * kTileRows + n;
    if (column >= columns) return -1;
    return gated && tile == 1 ? columns + column : column;  // the up half comes first
  };
  const auto gemm2_row = [&](int64_t block, int tile, int n) -> int64_t {
    const int64_t row = block * kBlockRows + tile * kTileRows + n;
    return row < shape.hidden_size ? row : -1;
  };
  pack_matrix(gemm1, shape.hidden_size, gemm1_blocks(shape.activation, columns), gemm1_row, packed1);
  pack_matrix(gemm2, columns, gemm2_blocks(shape.hidden_size), gemm2_row, packed2);
}

// Weights are read once in a call, from end to end: with pages of 4 KiB that costs a third more time. A wish only.
void wish_for_huge_pages(uintptr_t address, uintptr_t num_bytes) {
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (address + page - 1) / page * page, last = (address + num_bytes) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

// ---- A call ----

struct Call {
  Unit unit;
  Shape shape;
  int64_t num_tokens, top_k, local_expert_offset, num_local;
  const uint8_t* hidden_states;    // [num_tokens, hidden_size] fp8
  const int32_t* topk_ids;         // [num_tokens, top_k]
  const bfloat16* expert_weights;  // [num_tokens, top_k]
  bool use_routing_scales_on_input;
  const uint8_t *gemm1, *gemm2;  // packed, of num_local experts
  const float *up_scales, *gate_scales, *output2_scales;
  bfloat16* g;           // [num_tokens * top_k, hidden_size]; nullptr: not asked for
  int32_t* row_of_slot;  // [num_tokens, top_k]
  void* out;             // [num_tokens, hidden_size]; nullptr: not asked for
  OutputType type;
  int num_threads;
  bfloat16* inter;  // [Plan::inter_bytes]; not the caller's
};

// Rows of one expert that are multiplied in one go.
struct Piece {
  int64_t expert, first_row, first_tile;
  int num_rows;
  std::atomic<int> gemm1_left{0};  // tasks

  int num_tiles() const { return (num_rows + kTileRows - 1) / kTileRows; }

  // Of one step of a block. To read its weights and turn them into bfloat16 takes about as long as three products of a
  // tile of rows by AMX, or of a row by AVX-512.
  int64_t cost(Unit unit) const { return 3 + (unit == Unit::kAmx ? num_tiles() : num_rows); }
};

struct Task {
  enum Kind { kGemm1, kGemm2, kFinalize } kind;
  int piece;
  int64_t first, last;  // blocks; tokens
};

constexpr int64_t kPieceBytes = 1 << 20;  // most of a piece's rows as tiles: they stay in the second cache
constexpr int64_t kTasksPerThread = 4;    // so that no thread is left alone with a long one at the end
constexpr int64_t kThreadWorth = 4000;    // least cost that a thread is woken up for
constexpr int64_t kFinalizeTokens = 4;    // least of a task
constexpr int kSpins = 2000;

class Plan {
 public:
  explicit Plan(const Call& call) : call_(call) {
    sort_rows();
    cut_pieces();
    cut_tasks();
  }

  int64_t num_rows() const { return static_cast<int64_t>(slot_of_row_.size()); }
  int num_threads() const { return num_threads_; }
  int64_t row_bytes() const { return row_bytes_; }      // of the largest piece, as tiles
  int64_t inter_bytes() const { return inter_bytes_; }  // of all pieces, as tiles

  // What one of the threads does until no task is left. row_tiles: [row_bytes] aligned.
  void work(Scratch& scratch, bfloat16* row_tiles) {
    const UnitUse use(call_.unit);
    for (size_t i; (i = next_task_.fetch_add(1, std::memory_order_relaxed)) < tasks_.size();) {
      const Task& task = tasks_[i];
      switch (task.kind) {
        case Task::kGemm1:
          gemm1(task, scratch, row_tiles);
          break;
        case Task::kGemm2:
          gemm2(task, scratch);
          break;
        case Task::kFinalize:
          wait_for(gemm2_left_);
          finalize({call_.g, call_.row_of_slot, call_.use_routing_scales_on_input ? nullptr : call_.expert_weights,
                    call_.shape.hidden_size, call_.top_k, call_.type, call_.out},
                   task.first, task.last);
          break;
      }
    }
  }

 private:
  // Rows are grouped by local expert in ascending id, then by slot.
  void sort_rows() {
    const int64_t num_slots = call_.num_tokens * call_.top_k;
    first_row_.assign(static_cast<size_t>(call_.num_local) + 1, 0);
    const auto local = [this](int64_t slot) -> int64_t {
      const int64_t id = int64_t{call_.topk_ids[slot]} - call_.local_expert_offset;
      return id >= 0 && id < call_.num_local ? id : -1;
    };
    for (int64_t slot = 0; slot < num_slots; ++slot) {
      if (local(slot) >= 0) ++first_row_[local(slot) + 1];
    }
    for (int64_t expert = 0; expert < call_.num_local; ++expert) first_row_[expert + 1] += first_row_[expert];
    std::vector<int64_t> next(first_row_.begin(), first_row_.end() - 1);
    slot_of_row_.resize(static_cast<size_t>(first_row_.back()));
    token_of_row_.resize(slot_of_row_.size());
    for (int64_t slot = 0; slot < num_slots; ++slot) {
      const int64_t expert = local(slot);
      const int64_t row = expert >= 0 ? next[expert]++ : -1;
      call_.row_of_slot[slot] = static_cast<int32_t>(row);
      if (row < 0) continue;
      slot_of_row_[row] = slot;
      token_of_row_[row] = static_cast<int32_t>(slot / call_.top_k);
    }
  }

  // The largest first.
  void cut_pieces() {
    const int64_t tile_bytes = steps_of(call_.shape.hidden_size) * kTileElements * int64_t{sizeof(bfloat16)};
    const int64_t most_tiles = std::clamp<int64_t>(kPieceBytes / tile_bytes, 2, kMaxRowTiles);
    int64_t first_tile = 0;
    for (int64_t expert = 0; expert < call_.num_local; ++expert) {
      const int64_t stop = first_row_[expert + 1];
      for (int64_t row = first_row_[expert]; row < stop;) {
        auto piece = std::make_unique<Piece>();
        piece->expert = expert;
        piece->first_row = row;
        piece->first_tile = first_tile;
        piece->num_rows = static_cast<int>(std::min(stop - row, most_tiles * kTileRows));
        row += piece->num_rows;
        first_tile += piece->num_tiles();
        row_bytes_ = std::max(row_bytes_, piece->num_tiles() * tile_bytes);
        pieces_.push_back(std::move(piece));
      }
    }
    inter_bytes_ = first_tile * steps_of(call_.shape.intermediate_size) * kTileElements * int64_t{sizeof(bfloat16)};
    std::stable_sort(pieces_.begin(), pieces_.end(),
                     [](const auto& one, const auto& other) { return one->num_rows > other->num_rows; });
  }

  void cut_tasks() {
    const Shape& shape = call_.shape;
    const int64_t blocks1 = gemm1_blocks(shape.activation, shape.intermediate_size);
    const int64_t blocks2 = gemm2_blocks(shape.hidden_size);
    const int64_t steps1 = steps_of(shape.hidden_size), steps2 = steps_of(shape.intermediate_size);
    int64_t total = 0;
    for (const auto& piece : pieces_) total += (blocks1 * steps1 + blocks2 * steps2) * piece->cost(call_.unit);
    num_threads_ = static_cast<int>(std::clamp<int64_t>(total / kThreadWorth, 1, std::max(1, call_.num_threads)));
    const int64_t most = num_threads_ == 1 ? total : std::max<int64_t>(1, total / (num_threads_ * kTasksPerThread));
    const auto add = [&](Task::Kind kind, int piece, int64_t num_blocks, int64_t num_steps) {
      const int64_t cost = num_blocks * num_steps * pieces_[piece]->cost(call_.unit);
      const int64_t parts = std::clamp<int64_t>((cost + most - 1) / most, 1, num_blocks);
      for (int64_t part = 0; part < parts; ++part) {
        tasks_.push_back({kind, piece, num_blocks * part / parts, num_blocks * (part + 1) / parts});
      }
      return static_cast<int>(parts);
    };
    const int num_pieces = static_cast<int>(pieces_.size());
    for (int piece = 0; piece < num_pieces; ++piece) {
      pieces_[piece]->gemm1_left = add(Task::kGemm1, piece, blocks1, steps1);
    }
    // NOTE: a task waits for tasks before it only, which others have taken by then: so no thread waits for ever.
    int gemm2_tasks = 0;
    for (int piece = 0; piece < num_pieces; ++piece) gemm2_tasks += add(Task::kGemm2, piece, blocks2, steps2);
    gemm2_left_ = gemm2_tasks;
    if (call_.out == nullptr) return;
    const int64_t tokens = std::max(kFinalizeTokens, call_.num_tokens / (num_threads_ * kTasksPerThread) + 1);
    for (int64_t first = 0; first < call_.num_tokens; first += tokens) {
      tasks_.push_back({Task::kFinalize, 0, first, std::min(first + tokens, call_.num_tokens)});
    }
  }

  void gemm1(const Task& task, Scratch& scratch, bfloat16* row_tiles) {
    const Shape& shape = call_.shape;
    Piece& piece = *pieces_[task.piece];
    gather_rows(call_.hidden_states, shape.hidden_size, token_of_row_.data() + piece.first_row, piece.num_rows,
                row_tiles);
    float row_scales[kMaxRowTiles * kTileRows];
    std::fill_n(row_scales, kMaxRowTiles * kTileRows, 1.0f);
    if (call_.use_routing_scales_on_input) {
      for (int row = 0; row < piece.num_rows; ++row) {
        const uint32_t bits = uint32_t{call_.expert_weights[slot_of_row_[piece.first_row + row]]} << 16;
        std::memcpy(&row_scales[row], &bits, sizeof bits);
      }
    }
    Gemm1 p = {};
    p.unit = call_.unit;
    p.x = {row_tiles, piece.num_tiles(), piece.num_rows, steps_of(shape.hidden_size)};
    p.weights = call_.gemm1 + piece.expert * shape.gemm1_bytes();
    p.row_scales = row_scales;
    p.up_scale = call_.up_scales[piece.expert];
    p.gate_scale = call_.gate_scales[piece.expert];
    p.activation = shape.activation;
    p.intermediate_size = shape.intermediate_size;
    p.inter = inter_of(piece);
    run_gemm1(p, task.first, task.last, scratch);
    piece.gemm1_left.fetch_sub(1, std::memory_order_release);
  }

  void gemm2(const Task& task, Scratch& scratch) {
    const Shape& shape = call_.shape;
    const Piece& piece = *pieces_[task.piece];
    wait_for(piece.gemm1_left);
    Gemm2 p = {};
    p.unit = call_.unit;
    p.inter = {inter_of(piece), piece.num_tiles(), piece.num_rows, steps_of(shape.intermediate_size)};
    p.weights = call_.gemm2 + piece.expert * shape.gemm2_bytes();
    p.scale = call_.output2_scales[piece.expert];
    p.hidden_size = shape.hidden_size;
    p.g = call_.g + piece.first_row * shape.hidden_size;
    run_gemm2(p, task.first, task.last, scratch);
    gemm2_left_.fetch_sub(1, std::memory_order_release);
  }

  bfloat16* inter_of(const Piece& piece) const {
    return call_.inter + piece.first_tile * steps_of(call_.shape.intermediate_size) * kTileElements;
  }

  static void wait_for(const std::atomic<int>& left) {
    for (int spins = 0; left.load(std::memory_order_acquire) > 0; ++spins) {
      if (spins < kSpins) {
        _mm_pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

  const Call& call_;
  std::vector<int64_t> first_row_;  // of each local expert; the last: the number of rows
  std::vector<int64_t> slot_of_row_;
  std::vector<int32_t> token_of_row_;
  std::vector<std::unique_ptr<Piece>> pieces_;
  std::vector<Task> tasks_;
  std::atomic<size_t> next_task_{0};
  std::atomic<int> gemm2_left_{0};
  int64_t row_bytes_ = 0, inter_bytes_ = 0;
  int num_threads_ = 1;
};

// Memory that a thread keeps for its next call, up to a limit: to map megabytes anew in each call, and to touch them
// for the first time, takes a tenth of it.
class KeptMemory {
 public:
  uint8_t* take(int64_t num_bytes) {
    if (num_bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(::operator new(static_cast<size_t>(num_bytes), kCacheLine));
      size_ = num_bytes;
    }
    return static_cast<uint8_t*>(memory_.get());
  }

  void give_back() {
    if (size_ <= kMostBytes) return;
    memory_.reset();
    size_ = 0;
  }

 private:
  static constexpr std::align_val_t kCacheLine{64};
  static constexpr int64_t kMostBytes = 64 << 20;

  struct Free {
    void operator()(void* memory) const { ::operator delete(memory, kCacheLine); }
  };

  std::unique_ptr<void, Free> memory_;
  int64_t size_ = 0;
};

int64_t run(Call call) {
  Plan plan(call);
  const int64_t each = static_cast<int64_t>(sizeof(Scratch)) + plan.row_bytes();
  const int64_t g_bytes = plan.num_rows() * call.shape.hidden_size * int64_t{sizeof(bfloat16)};
  static thread_local KeptMemory kept;
  uint8_t* const scratch_memory = kept.take(each * plan.num_threads() + plan.inter_bytes() + (call.g ? 0 : g_bytes));
  call.inter = reinterpret_cast<bfloat16*>(scratch_memory + each * plan.num_threads());
  if (call.g == nullptr) call.g = call.inter + plan.inter_bytes() / int64_t{sizeof(bfloat16)};
  // NOTE: torch's own threads where it brings the same OpenMP library. After each of its operations they look out for
  // more to do for some milliseconds, and other threads would have to share the cores with them.
#pragma omp parallel num_threads(plan.num_threads())
  {
    auto* scratch = reinterpret_cast<Scratch*>(scratch_memory + each * omp_get_thread_num());
    plan.work(*scratch, reinterpret_cast<bfloat16*>(scratch + 1));
  }
  kept.give_back();
  return plan.num_rows();
}

// ---- Python ----

template <typename T>
T* pointer(unsigned long long address) {
  return reinterpret_cast<T*>(address);
}

// function() without the interpreter's lock; false, with MemoryError set, where there was none left.
template <typename Function>
bool without_interpreter(const Function& function) {
  bool is_done = true;
  PyThreadState* state = PyEval_SaveThread();
  try {
    function();
  } catch (const std::bad_alloc&) {
    is_done = false;
  }
  PyEval_RestoreThread(state);
  if (!is_done) PyErr_NoMemory();
  return is_done;
}

bool is_unit(int number) {
  if (number >= 0 && number < kNumUnits) return true;
  PyErr_Format(PyExc_ValueError, "unit is %d, expected 0 to %d", number, kNumUnits - 1);
  return false;
}

PyDoc_STRVAR(why_not_doc, "why_not(unit)\n\nNone where this process can use the unit, else the reason why it cannot.");

PyObject* why_not(PyObject*, PyObject* arguments) {
  int unit;
  if (!PyArg_ParseTuple(arguments, "i", &unit) || !is_unit(unit)) return nullptr;
  const char* reason = why_unsupported(static_cast<Unit>(unit));
  if (reason == nullptr) Py_RETURN_NONE;
  return PyUnicode_FromString(reason);
}

PyDoc_STRVAR(packed_sizes_doc,
             "packed_sizes(hidden_size, intermediate_size, activation)\n\n"
             "Bytes of one expert's packed gemm1_weights and gemm2_weights.");

PyObject* packed_sizes(PyObject*, PyObject* arguments) {
  long long hidden_size, intermediate_size;
  int activation;
  if (!PyArg_ParseTuple(arguments, "LLi", &hidden_size, &intermediate_size, &activation)) return nullptr;
  const Shape shape{hidden_size, intermediate_size, static_cast<Activation>(activation)};
  return Py_BuildValue("(LL)", static_cast<long long>(shape.gemm1_bytes()),
                       static_cast<long long>(shape.gemm2_bytes()));
}

PyDoc_STRVAR(pack_doc,
             "pack(hidden_size, intermediate_size, activation, gemm1_weights, gemm2_weights, packed1, packed2)\n\n"
             "Put the FP8 weights of one expert, [M, H] and [H, I], into the order in which run reads them.");

PyObject* pack(PyObject*, PyObject* arguments) {
  long long hidden_size, intermediate_size;
  int activation;
  unsigned long long gemm1, gemm2, packed1, packed2;
  if (!PyArg_ParseTuple(arguments, "LLiKKKK", &hidden_size, &intermediate_size, &activation, &gemm1, &gemm2, &packed1,
                        &packed2)) {
    return nullptr;
  }
  const Shape shape{hidden_size, intermediate_size, static_cast<Activation>(activation)};
  const bool is_done = without_interpreter([&] {
    pack_expert(shape, pointer<uint8_t>(gemm1), pointer<uint8_t>(gemm2), pointer<uint8_t>(packed1),
                pointer<uint8_t>(packed2));
  });
  if (!is_done) return nullptr;
  Py_RETURN_NONE;
}

PyDoc_STRVAR(use_huge_pages_doc,
             "use_huge_pages(address, num_bytes)\n\n"
             "Let the kernel back this memory, which was not touched yet, with huge pages where it has some.");

PyObject* use_huge_pages(PyObject*, PyObject* arguments) {
  unsigned long long address, num_bytes;
  if (!PyArg_ParseTuple(arguments, "KK", &address, &num_bytes)) return nullptr;
  wish_for_huge_pages(address, num_bytes);
  Py_RETURN_NONE;
}

PyDoc_STRVAR(
    run_doc,
    "run(...)\n\n"
    "Both products of every local expert, into the rows of g, and where out is not 0 their sum; see _cpu_experts.pyi.\n"
    "Returns the number of rows.");

PyObject* run_call(PyObject*, PyObject* arguments) {
  long long hidden_size, intermediate_size, num_tokens, top_k, local_expert_offset, num_local;
  int unit, activation, use_routing_scales_on_input, output_type, num_threads;
  unsigned long long hidden_states, topk_ids, expert_weights, gemm1, gemm2, up_scales, gate_scales, output2_scales;
  unsigned long long g, row_of_slot, out;
  if (!PyArg_ParseTuple(arguments, "iLLiLLLLpKKKKKKKKKKKii", &unit, &hidden_size, &intermediate_size, &activation,
                        &num_tokens, &top_k, &local_expert_offset, &num_local, &use_routing_scales_on_input,
                        &hidden_states, &topk_ids, &expert_weights, &gemm1, &gemm2, &up_scales, &gate_scales,
                        &output2_scales, &g, &row_of_slot, &out, &output_type, &num_threads)) {
    return nullptr;
  }
  if (!is_unit(unit)) return nullptr;
  if (const char* reason = why_unsupported(static_cast<Unit>(unit))) {
    PyErr_SetString(PyExc_RuntimeError, reason);
    return nullptr;
  }
  Call call = {};
  call.unit = static_cast<Unit>(unit);
  call.shape = {hidden_size, intermediate_size, static_cast<Activation>(activation)};
  call.num_tokens = num_tokens;
  call.top_k = top_k;
  call.local_expert_offset = local_expert_offset;
  call.num_local = num_local;
  call.hidden_states = pointer<uint8_t>(hidden_states);
  call.topk_ids = pointer<int32_t>(topk_ids);
  call.expert_weights = pointer<bfloat16>(expert_weights);
  call.use_routing_scales_on_input = use_routing_scales_on_input != 0;
  call.gemm1 = pointer<uint8_t>(gemm1);
  call.gemm2 = pointer<uint8_t>(gemm2);
  call.up_scales = pointer<float>(up_scales);
  call.gate_scales = pointer<float>(gate_scales);
  call.output2_scales = pointer<float>(output2_scales);
  call.g = pointer<bfloat16>(g);
  call.row_of_slot = pointer<int32_t>(row_of_slot);
  call.out = pointer<void>(out);
  call.type = static_cast<OutputType>(output_type);
  call.num_threads = num_threads;
  int64_t num_rows = 0;
  if (!without_interpreter([&] { num_rows = run(call); })) return nullptr;
  return PyLong_FromLongLong(num_rows);
}

PyMethodDef methods[] = {
    {"why_not", why_not, METH_VARARGS, why_not_doc},
    {"packed_sizes", packed_sizes, METH_VARARGS, packed_sizes_doc},
    {"pack", pack, METH_VARARGS, pack_doc},
    {"use_huge_pages", use_huge_pages, METH_VARARGS, use_huge_pages_doc},
    {"run", run_call, METH_VARARGS, run_doc},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "_cpu_experts",
    "The experts of a layer on CPUs with AVX-512 BF16.",
    -1,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__cpu_experts() { return PyModule_Create(&module); }

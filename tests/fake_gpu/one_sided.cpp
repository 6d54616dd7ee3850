// Windows, puts and signals: a put writes the peer's memory without the peer, and only its signal is an edge.
#include <cstdlib>

#include "communicator.hpp"
#include "exports.hpp"

using namespace fake;

namespace {

constexpr size_t kAlignment = 4096;

struct SignalAwaited {
  int count, peer, index, context;
};

}  // namespace

FAKE_API int ncclMemAlloc(void** block, size_t bytes) {
  Lock lock(machine().mutex);
  *block = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  if (!*block) return kNcclUnhandledCudaError;
  nccl().memory[*block] = bytes;
  return kNcclSuccess;
}

// The memory itself stays until the double is reset, so that a late access is reported and not fatal.
FAKE_API int ncclMemFree(void* block) {
  Lock lock(machine().mutex);
  return nccl().memory.count(block) ? kNcclSuccess : kNcclInvalidArgument;
}

// Collective: the n-th registration of every rank makes one window.
FAKE_API int ncclCommWindowRegister(void* handle, void* block, size_t bytes, void** window, int) {
  Lock lock(machine().mutex);
  auto comm = nccl().communicators.find(handle);
  if (!comm) return kNcclInvalidArgument;
  if (!comm->ready()) return comm->fail(kNcclInvalidUsage, "the communicator is not ready");
  if (reinterpret_cast<uintptr_t>(block) % kAlignment)
    return comm->fail(kNcclInvalidArgument, "a window begins at a multiple of 4096 bytes");
  const size_t number = comm->windows++;
  auto& windows = comm->world->windows;
  if (windows.size() <= number) windows.resize(number + 1);
  if (!windows[number]) windows[number] = std::make_shared<Window>();
  windows[number]->memory[comm->rank] = {static_cast<char*>(block), bytes};
  *window = nccl().windows.add(windows[number]);
  return kNcclSuccess;
}

FAKE_API int ncclCommWindowDeregister(void*, void* window) {
  Lock lock(machine().mutex);
  return nccl().windows.remove(window) ? kNcclSuccess : kNcclInvalidArgument;
}

FAKE_API int ncclPutSignal(const void* source, size_t count, int type, int peer, void* window, size_t offset, int index,
                           int context, unsigned flags, void* handle, void* stream) {
  if (machine().null_mode) return kNcclSuccess;
  const size_t bytes = count * size_of(type);
  std::shared_ptr<Window> found;
  {
    Lock lock(machine().mutex);
    auto comm = nccl().communicators.find(handle);
    if (!comm) return kNcclInvalidArgument;
    if (index || context || flags) return comm->fail(kNcclInvalidArgument, "index, context and flags must be 0");
    found = nccl().windows.find(window);
    if (!found || !found->memory.count(peer)) return comm->fail(kNcclInvalidUsage, "the peer has no such window");
    if (offset + bytes > found->memory[peer].second)
      return comm->fail(kNcclInvalidArgument, "the put ends outside of the peer's window");
  }
  return add(handle, stream, {{Operation::kPut, source, nullptr, bytes, peer, "", found, offset, 0}});
}

FAKE_API int ncclSignal(int peer, int index, int context, unsigned flags, void* handle, void* stream) {
  if (machine().null_mode) return kNcclSuccess;
  if (index || context || flags) return kNcclInvalidArgument;
  return add(handle, stream, {{Operation::kPut, nullptr, nullptr, 0, peer, "", nullptr, 0, 0}});
}

FAKE_API int ncclWaitSignal(int count, const SignalAwaited* awaited, void* handle, void* stream) {
  if (machine().null_mode) return kNcclSuccess;
  std::vector<Operation> operations;
  for (int i = 0; i < count; i++) {
    if (awaited[i].index || awaited[i].context) return kNcclInvalidArgument;
    operations.push_back(
        {Operation::kWaitSignal, nullptr, nullptr, 0, awaited[i].peer, "", nullptr, 0, awaited[i].count});
  }
  return add(handle, stream, std::move(operations));
}

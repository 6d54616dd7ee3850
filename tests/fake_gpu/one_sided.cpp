// Windows, puts and signals: a put writes the peer's memory without the peer, and only its signal is an edge.
#include <cstdlib>

#include "communicator.hpp"
#include "exports.hpp"

using namespace fake;

namespace {

constexpr size_t kAlignment = 4096;
constexpr int kSymmetric = 1;

struct SignalAwaited {
  int count, peer, index, context;
};

// Every rank has registered its part: now they have handles, or all an error.
void complete(const std::shared_ptr<World>& world, const std::shared_ptr<Window>& window) {
  const size_t bytes = window->memory.begin()->second.second;
  bool equal = true;
  for (const auto& [_, part] : window->memory) equal = equal && part.second == bytes;
  for (const auto& [rank, handle] : window->handles) {
    auto member = world->members[rank].lock();
    if (!member) continue;
    member->registering = false;
    if (equal)
      *handle = nccl().windows.add(window);
    else
      member->error = member->fail(kNcclInvalidArgument, "the parts of a window are of different sizes");
  }
  window->handles.clear();
}

// Whether bytes of a rank lie in a symmetric window of its communicator.
bool inside_window(const Communicator& comm, const void* begin, size_t bytes) {
  const auto* first = static_cast<const char*>(begin);
  for (const auto& window : comm.world->windows) {
    const auto part = window ? window->memory.find(comm.rank) : decltype(window->memory.end()){};
    if (window && window->symmetric && part != window->memory.end() && first >= part->second.first &&
        first + bytes <= part->second.first + part->second.second)
      return true;
  }
  return false;
}

}  // namespace

FAKE_API int ncclMemAlloc(void** block, size_t bytes) {
  if (current_context() < 0) return kNcclUnhandledCudaError;
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

// Collective: the n-th registration of every rank makes one window, whose handle is there when all have come.
FAKE_API int ncclCommWindowRegister(void* handle, void* block, size_t bytes, void** window, int flags) {
  if (machine().null_mode) {
    *window = handle;
    return kNcclSuccess;
  }
  Lock lock(machine().mutex);
  auto comm = nccl().communicators.find(handle);
  if (!comm) return kNcclInvalidArgument;
  if (!comm->ready()) return comm->fail(kNcclInvalidUsage, "the communicator is not ready");
  if (reinterpret_cast<uintptr_t>(block) % kAlignment)
    return comm->fail(kNcclInvalidArgument, "a window begins at a multiple of 4096 bytes");
  if (nccl().refuse_windows == comm->context)
    return comm->fail(kNcclUnhandledCudaError, "a refusal that a test ordered");
  const size_t number = comm->windows++;
  auto& windows = comm->world->windows;
  if (windows.size() <= number) windows.resize(number + 1);
  auto& mine = windows[number];
  if (!mine) mine = std::make_shared<Window>();
  mine->memory[comm->rank] = {static_cast<char*>(block), bytes};
  mine->handles[comm->rank] = window;
  mine->symmetric = mine->symmetric && flags == kSymmetric;
  *window = nullptr;
  comm->registering = true;
  if (mine->memory.size() == static_cast<size_t>(comm->world->size)) complete(comm->world, mine);
  return await(lock, comm);
}

// Not collective, but no put of a peer may be under way.
FAKE_API int ncclCommWindowDeregister(void* handle, void* window) {
  if (machine().null_mode) return kNcclSuccess;
  Lock lock(machine().mutex);
  auto comm = nccl().communicators.find(handle);
  auto found = nccl().windows.find(window);
  if (!comm || !found) return kNcclInvalidArgument;
  if (!comm->ready()) return comm->fail(kNcclInvalidUsage, "the communicator is not ready");
  found->memory.erase(comm->rank);
  nccl().windows.remove(window);
  return kNcclSuccess;
}

FAKE_API int ncclPutSignal(const void* source, size_t count, int type, int peer, void* window, size_t offset, int index,
                           int context, unsigned flags, void* handle, void* stream) {
  if (machine().null_mode) return kNcclSuccess;
  const size_t bytes = count * size_of(type);
  std::shared_ptr<Window> found;
  char* target = nullptr;
  {
    Lock lock(machine().mutex);
    auto comm = nccl().communicators.find(handle);
    if (!comm) return kNcclInvalidArgument;
    if (index || context || flags) return comm->fail(kNcclInvalidArgument, "index, context and flags must be 0");
    found = nccl().windows.find(window);
    if (!found || !found->memory.count(peer)) return comm->fail(kNcclInvalidUsage, "the peer has no such window");
    if (offset + bytes > found->memory[peer].second)
      return comm->fail(kNcclInvalidArgument, "the put ends outside of the peer's window");
    if (!inside_window(*comm, source, bytes))
      return comm->fail(kNcclInvalidArgument, "what is put lies in no symmetric window");
    target = found->memory[peer].first + offset;
  }
  return add(handle, stream, {{Operation::kPut, source, target, bytes, peer, found, offset, 0}});
}

FAKE_API int ncclSignal(int peer, int index, int context, unsigned flags, void* handle, void* stream) {
  if (machine().null_mode) return kNcclSuccess;
  if (index || context || flags) return kNcclInvalidArgument;
  return add(handle, stream, {{Operation::kPut, nullptr, nullptr, 0, peer, nullptr, 0, 0}});
}

FAKE_API int ncclWaitSignal(int count, const SignalAwaited* awaited, void* handle, void* stream) {
  if (machine().null_mode) return kNcclSuccess;
  std::vector<Operation> operations;
  for (int i = 0; i < count; i++) {
    if (awaited[i].index || awaited[i].context || awaited[i].count < 1) return kNcclInvalidArgument;
    operations.push_back({Operation::kWaitSignal, nullptr, nullptr, 0, awaited[i].peer, nullptr, 0, awaited[i].count});
  }
  return add(handle, stream, std::move(operations));
}

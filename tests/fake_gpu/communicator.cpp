// Entry points of libnccl.so.2 that make, ask and end communicators.
#include "communicator.hpp"

#include <climits>
#include <cstring>

#include "exports.hpp"

namespace fake {

Nccl& nccl() {
  static Nccl* const it = new Nccl;
  return *it;
}

void Nccl::reset() {
  communicators.clear();
  windows.clear();
  worlds.clear();
  for (auto& [block, _] : memory) std::free(block);
  memory.clear();
  last_error.clear();
  version = 23203;
  refuse_windows = -1;
  enquiries = 1;
}

int Communicator::fail(Result result, std::string why) {
  nccl().last_error = last_error = std::move(why);
  return result;
}

namespace {

// Up to `maxCTAs`, the part of ncclConfig_t that the double reads.
struct Config {
  size_t size;
  unsigned magic, version;
  int blocking, cga_cluster_size, min_ctas, max_ctas;
};
constexpr unsigned kMagic = 0xcafebeef;
constexpr int kUndefined = INT_MIN;

bool blocks(const void* config) {
  const int value = config ? static_cast<const Config*>(config)->blocking : kUndefined;
  return value == kUndefined || value != 0;
}

bool valid(const void* config) { return !config || static_cast<const Config*>(config)->magic == kMagic; }

}  // namespace

int await(Lock& lock, const std::shared_ptr<Communicator>& comm) {
  if (machine().null_mode) return kNcclSuccess;
  machine().notify();
  if (!comm->blocking) return comm->ready() ? kNcclSuccess : kNcclInProgress;
  machine().changed.wait(lock, [&] { return machine().released || comm->aborted || comm->ready(); });
  return comm->aborted ? kNcclInvalidUsage : kNcclSuccess;
}

bool connect(Lock& lock, const Launch& launch) {
  const auto& comm = launch.communicator;
  for (const auto& x : launch.operations)
    if (x.kind == Operation::kSend || x.kind == Operation::kRecv)
      comm->world->met.insert({comm->rank, x.peer, x.kind == Operation::kSend});
  machine().notify();
  if (!comm->blocking) return true;
  machine().changed.wait(lock, [&] {
    if (machine().released || comm->aborted) return true;
    for (const auto& x : launch.operations)
      if ((x.kind == Operation::kSend || x.kind == Operation::kRecv) &&
          !comm->world->met.count({x.peer, comm->rank, x.kind != Operation::kSend}))
        return false;
    return true;
  });
  return !machine().released && !comm->aborted;
}

}  // namespace fake

using namespace fake;

struct UniqueId {
  char text[128];
};

FAKE_API int ncclGetVersion(int* version) {
  *version = nccl().version;
  return kNcclSuccess;
}

FAKE_API int ncclGetUniqueId(UniqueId* id) {
  Lock lock(machine().mutex);
  std::memset(id, 0, sizeof *id);
  std::snprintf(id->text, sizeof id->text, "double %d", nccl().unique_ids++);
  return kNcclSuccess;
}

FAKE_API int ncclCommInitRankConfig(void** handle, int size, UniqueId id, int rank, const void* config) {
  Lock lock(machine().mutex);
  if (!valid(config) || size < 1 || rank < 0 || rank >= size) return kNcclInvalidArgument;
  if (current_context() < 0) return kNcclUnhandledCudaError;
  auto& world = nccl().worlds[std::string(id.text, sizeof id.text)];
  if (!world) world = std::make_shared<World>(size);
  if (world->size != size || world->members.count(rank)) return kNcclInvalidArgument;
  auto comm = std::make_shared<Communicator>();
  comm->world = world;
  comm->rank = rank;
  comm->context = current_context();
  comm->blocking = blocks(config);
  const auto* given = static_cast<const Config*>(config);
  if (given && given->size >= sizeof(Config)) comm->max_ctas = given->max_ctas;
  world->members[rank] = comm;
  *handle = nccl().communicators.add(comm);
  return await(lock, comm);
}

FAKE_API int ncclCommGetAsyncError(void* handle, int* error) {
  if (machine().null_mode) return *error = kNcclSuccess;
  Lock lock(machine().mutex);
  auto comm = nccl().communicators.find(handle);
  if (!comm) return kNcclInvalidArgument;
  *error = comm->error;
  if (comm->error) return kNcclSuccess;
  if (!comm->ready()) {
    *error = kNcclInProgress;
  } else if (comm->enquiries_left) {
    *error = kNcclInProgress;
    if (--comm->enquiries_left == 0) {
      for (auto& waiting : comm->deferred) launch(std::move(waiting));
      comm->deferred.clear();
    }
  }
  return kNcclSuccess;
}

FAKE_API int ncclCommDestroy(void* handle) {
  Lock lock(machine().mutex);
  auto comm = nccl().communicators.find(handle);
  if (!comm) return kNcclInvalidArgument;
  if (comm->launched != comm->finished && !machine().null_mode)
    machine().misuse(comm->name() + " destroyed a communicator with operations under way; the library would block");
  nccl().communicators.remove(handle);
  return kNcclSuccess;
}

// Ends this rank's operations; those of the other ranks wait on, as they do in the library.
FAKE_API int ncclCommAbort(void* handle) {
  Lock lock(machine().mutex);
  auto comm = nccl().communicators.find(handle);
  if (!comm) return kNcclInvalidArgument;
  comm->aborted = true;
  nccl().communicators.remove(handle);
  machine().notify();
  machine().changed.wait(lock, [&] { return machine().released || comm->waiting == 0; });
  return kNcclSuccess;
}

FAKE_API const char* ncclGetErrorString(int result) {
  switch (result) {
    case kNcclSuccess:
      return "no error";
    case kNcclUnhandledCudaError:
      return "unhandled cuda error (run with NCCL_DEBUG=INFO for details)";
    case kNcclInternalError:
      return "internal error";
    case kNcclInvalidArgument:
      return "invalid argument";
    case kNcclInvalidUsage:
      return "invalid usage";
    case kNcclRemoteError:
      return "remote process exited or there was a network error";
    case kNcclInProgress:
      return "NCCL operation in progress";
    default:
      return "unknown result code";
  }
}

FAKE_API const char* ncclGetLastError(void* handle) {
  Lock lock(machine().mutex);
  thread_local std::string text;
  auto comm = handle ? nccl().communicators.find(handle) : nullptr;
  text = comm ? comm->last_error : nccl().last_error;
  return text.c_str();
}

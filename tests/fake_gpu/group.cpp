// Entry points of libnccl.so.2 that move data: operations gather in the calling thread's group until it ends.
#include "communicator.hpp"
#include "exports.hpp"

namespace fake {
namespace {

thread_local int group_depth = 0;
thread_local std::vector<Launch> grouped;

int flush(Lock& lock) {
  std::vector<Launch> launches;
  launches.swap(grouped);
  int result = kNcclSuccess;
  for (auto& one : launches) {
    auto& comm = *one.communicator;
    if (nccl().enquiries && !comm.blocking) {
      comm.enquiries_left = nccl().enquiries;
      comm.deferred.push_back(std::move(one));
      result = kNcclInProgress;
    } else if (connect(lock, one)) {
      launch(std::move(one));
    } else {
      result = kNcclInternalError;
    }
  }
  // They may be the last to hold a stream, whose end takes the lock.
  lock.unlock();
  launches.clear();
  lock.lock();
  return result;
}

int check(const std::shared_ptr<Communicator>& comm, const std::shared_ptr<Stream>& stream, int peer) {
  if (!comm) return kNcclInvalidArgument;
  if (!comm->ready()) return comm->fail(kNcclInvalidUsage, "the communicator is not ready");
  if (comm->enquiries_left) return comm->fail(kNcclInvalidUsage, "the last group is still being launched");
  if (!stream || stream->context != comm->context)
    return comm->fail(kNcclInvalidArgument, "the stream is not of the communicator's device");
  if (peer < 0 || peer >= comm->world->size)
    return comm->fail(kNcclInvalidArgument, "peer " + std::to_string(peer) + " is out of range");
  return kNcclSuccess;
}

}  // namespace

int add(void* communicator, void* stream_handle, std::vector<Operation> operations) {
  Lock lock(machine().mutex);
  auto comm = nccl().communicators.find(communicator);
  auto stream = machine().stream(stream_handle);
  for (const auto& operation : operations)
    if (int result = check(comm, stream, operation.peer)) return result;
  Launch* open = nullptr;
  for (auto& one : grouped)
    if (one.communicator == comm) open = &one;
  if (open && open->stream != stream)
    return comm->fail(kNcclInvalidUsage, "the double knows one stream for a communicator's group");
  if (!open) {
    grouped.push_back({comm, stream, {}, {}});
    open = &grouped.back();
  }
  for (auto& operation : operations) open->operations.push_back(std::move(operation));
  open->host = machine().host(comm->context).clock;
  return group_depth ? kNcclSuccess : flush(lock);
}

size_t size_of(int type) {
  constexpr size_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
  return sizes[type];
}

}  // namespace fake

using namespace fake;

FAKE_API int ncclGroupStart() {
  note_call(__func__);
  if (!machine().null_mode) group_depth++;
  return kNcclSuccess;
}

FAKE_API int ncclGroupEnd() {
  note_call(__func__);
  if (machine().null_mode) return kNcclSuccess;
  if (group_depth == 0) return kNcclInvalidUsage;
  if (--group_depth) return kNcclSuccess;
  Lock lock(machine().mutex);
  return flush(lock);
}

FAKE_API int ncclSend(const void* data, size_t count, int type, int peer, void* comm, void* stream) {
  note_call(__func__);
  if (machine().null_mode) return kNcclSuccess;
  return add(comm, stream, {{Operation::kSend, data, nullptr, count * size_of(type), peer, nullptr, 0, 0}});
}

FAKE_API int ncclRecv(void* data, size_t count, int type, int peer, void* comm, void* stream) {
  note_call(__func__);
  if (machine().null_mode) return kNcclSuccess;
  return add(comm, stream, {{Operation::kRecv, nullptr, data, count * size_of(type), peer, nullptr, 0, 0}});
}

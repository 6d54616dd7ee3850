#include "nccl_transport.hpp"

#include <algorithm>
#include <cstring>
#include <thread>

#include "edges.hpp"

namespace adf {
namespace {
// So many epochs of a slot may be under way: a host that runs ahead of its device waits then. With fewer the device
// might run dry; without a limit nobody could tell which of them it stands at.
constexpr int kMarks = 8;
constexpr auto kPoll = std::chrono::microseconds(50);
// How long an abort waits to have the communicator to itself, and the end of a lane for what may never end.
constexpr auto kAbortPatience = std::chrono::seconds(1);

CuStream handle(Stream stream) { return reinterpret_cast<CuStream>(stream); }

std::string seconds(double s) {
  char text[32];
  snprintf(text, sizeof text, "%g s", s);
  return text;
}
}  // namespace

void check_nccl(const Libraries& libraries, int result, const char* what) {
  if (result == kNcclSuccess) return;
  std::string message = std::string(what) + ": " + libraries.ncclGetErrorString(result);
  const char* last = libraries.ncclGetLastError(nullptr);
  if (last != nullptr && *last != '\0') message += std::string(" (") + last + ")";
  throw ExchangeError(message);
}

NcclTransport::NcclTransport(std::shared_ptr<const Libraries> libraries, const std::string& unique_id, int rank,
                             int size, const NcclOptions& options)
    : Transport(rank, size), libraries_(std::move(libraries)), options_(options) {
  NcclUniqueId id;
  if (unique_id.size() != sizeof id.internal) throw std::invalid_argument("a unique id of NCCL has 128 bytes");
  memcpy(id.internal, unique_id.data(), sizeof id.internal);
  start_stream();
  begin_aside("ncclCommInitRankConfig",
              [lib = libraries_, id, rank, size, settings = config()](NcclComm* comm) mutable {
                return lib->ncclCommInitRankConfig(comm, size, id, rank, &settings);
              });
}

void NcclTransport::begin_aside(const char* what, std::function<int(NcclComm*)> call) {
  aside_.begin([lib = libraries_, comm = comm_, device = context_, what, call = std::move(call)] {
    std::lock_guard<std::mutex> lock(comm->mutex);
    if (comm->gone) return;
    lib->cuCtxSetCurrent(device);
    comm->aside = true;
    const int result = call(&comm->handle);
    comm->aside = false;
    if (comm->gone && comm->handle != nullptr) {
      lib->ncclCommAbort(comm->handle);
      comm->handle = nullptr;
    } else {
      check_nccl(*lib, result, what);
    }
  });
}

void NcclTransport::start_stream() {
  libraries_->require_driver();
  cuda(libraries_->cuInit(0), "cuInit");
  cuda(libraries_->cuCtxGetCurrent(&context_), "cuCtxGetCurrent");
  if (context_ == nullptr) throw ExchangeError("no CUDA device is current; call torch.cuda.set_device first");
  int least = 0, greatest = 0;
  cuda(libraries_->cuCtxGetStreamPriorityRange(&least, &greatest), "cuCtxGetStreamPriorityRange");
  cuda(libraries_->cuStreamCreateWithPriority(&stream_, kCuStreamNonBlocking, greatest), "cuStreamCreateWithPriority");
}

NcclConfig NcclTransport::config() const {
  NcclConfig settings;
  settings.blocking = 1;
  settings.commName = "asyncdiff_fast";
  settings.maxCTAs = options_.max_ctas;
  settings.CTAPolicy = options_.cta_policy;
  return settings;
}

NcclTransport::~NcclTransport() {
  abort("dropped");
  free_driver_objects();
}

void NcclTransport::free_driver_objects() {
  // A call that is stuck aside may have its work on them.
  if (!settled()) return;
  const Entered entered(*libraries_, context_);
  for (const Mark& m : marks_) {
    if (m.ready != nullptr) libraries_->cuEventDestroy_v2(m.ready);
    if (m.done != nullptr) libraries_->cuEventDestroy_v2(m.done);
  }
  libraries_->cuStreamDestroy_v2(stream_);
}

bool NcclTransport::ready() {
  if (gone()) throw ExchangeError("the NCCL communicator is closed");
  if (aside_.settled()) return true;
  if (Clock::now() - began_ > std::chrono::duration<double>(options_.timeout_s)) {
    abort("not connected");
    throw ExchangeError("rank " + std::to_string(rank()) + " waited " + seconds(options_.timeout_s) +
                        " for all ranks to connect by NCCL; one died or hangs: see the logs, or raise timeout_s");
  }
  return false;
}

std::string NcclTransport::unique_id(const Libraries& libraries) {
  NcclUniqueId id;
  if (libraries.ncclGetUniqueId(&id) != kNcclSuccess) throw ExchangeError("ncclGetUniqueId failed");
  return std::string(id.internal, sizeof id.internal);
}

void NcclTransport::cuda(int result, const char* what) const {
  if (result == kCuSuccess) return;
  const char* text = nullptr;
  libraries_->cuGetErrorString(result, &text);
  throw ExchangeError(std::string(what) + ": " + (text != nullptr ? text : std::to_string(result)));
}

bool NcclTransport::opened(Clock::time_point deadline) {
  while (!aside_.settled()) {
    if (gone()) throw ExchangeError("the NCCL communicator is closed");
    if (Clock::now() > deadline) return false;
    std::this_thread::sleep_for(kPoll);
  }
  return true;
}

// An empty message each way: the first group with a peer connects to it, which takes both.
void NcclTransport::open(const std::vector<const Group*>& groups, const std::vector<std::vector<size_t>>&) {
  std::vector<Message> first;
  for (const Group* group : groups) {
    for (const Message& x : group->messages) {
      if (connected_.insert({x.peer, x.sends}).second) first.push_back(x);
    }
  }
  if (first.empty()) return;
  begin_aside("connecting to peers", [lib = libraries_, first = std::move(first), stream = stream_](NcclComm* comm) {
    int result = lib->ncclGroupStart();
    for (const Message& x : first) {
      const int one = x.sends ? lib->ncclSend(x.buffers[0], 0, kNcclInt8, x.peer, *comm, stream)
                              : lib->ncclRecv(x.buffers[0], 0, kNcclInt8, x.peer, *comm, stream);
      if (one != kNcclSuccess) result = one;
    }
    const int ended = lib->ncclGroupEnd();
    return result == kNcclSuccess ? ended : result;
  });
}

void NcclTransport::attach(Group* group) {
  const Entered entered(*libraries_, context_);
  std::lock_guard<std::mutex> lock(marks_mutex_);
  for (int i = 0; i < std::max(group->depth, kMarks); ++i) {
    if (!free_marks_.empty()) {
      group->marks.push_back(free_marks_.back());
      free_marks_.pop_back();
      continue;
    }
    Mark fresh;
    cuda(libraries_->cuEventCreate(&fresh.ready, kCuEventDisableTiming), "cuEventCreate");
    cuda(libraries_->cuEventCreate(&fresh.done, kCuEventDisableTiming), "cuEventCreate");
    group->marks.push_back(static_cast<int>(marks_.size()));
    marks_.push_back(fresh);
  }
}

void NcclTransport::detach(Group* group) {
  std::lock_guard<std::mutex> lock(marks_mutex_);
  free_marks_.insert(free_marks_.end(), group->marks.begin(), group->marks.end());
  group->marks.clear();
}

const NcclTransport::Mark& NcclTransport::mark(const Group& group, uint64_t epoch) const {
  return marks_[group.marks[epoch % group.marks.size()]];
}

void NcclTransport::submit(const Group& group, uint64_t epoch, Stream stream) {
  const Libraries& lib = *libraries_;
  const Entered entered(lib, context_);
  const Mark& m = mark(group, epoch);
  cuda(lib.cuEventRecord(m.ready, handle(stream)), "cuEventRecord");
  // `ready` keeps this lane behind whoever wrote what is sent, and behind whoever read what is received over.
  if (group.sends) {
    ADF_EDGE(Edge::SendAfterProducer, cuda(lib.cuStreamWaitEvent(stream_, m.ready, 0), "cuStreamWaitEvent"));
  } else {
    ADF_EDGE(Edge::RecvAfterReaders, cuda(lib.cuStreamWaitEvent(stream_, m.ready, 0), "cuStreamWaitEvent"));
  }
  move(group, epoch);
  ADF_EDGE(Edge::DoneRecorded, cuda(lib.cuEventRecord(m.done, stream_), "cuEventRecord"));
}

void NcclTransport::move(const Group& group, uint64_t epoch) {
  const Libraries& lib = *libraries_;
  issue_group([&](NcclComm comm, const auto& note) {
    for (const Message& x : group.messages) {
      char* buffer = x.buffers[epoch % group.depth];
      note(x.sends ? lib.ncclSend(buffer, x.bytes, kNcclInt8, x.peer, comm, stream_)
                   : lib.ncclRecv(buffer, x.bytes, kNcclInt8, x.peer, comm, stream_));
    }
  });
}

bool NcclTransport::order(const Group& group, uint64_t epoch, Stream stream, Clock::time_point) {
  // 0 is the default stream of whichever context is current.
  const Entered entered(*libraries_, context_);
  cuda(libraries_->cuStreamWaitEvent(handle(stream), mark(group, epoch).done, 0), "cuStreamWaitEvent");
  return true;
}

bool NcclTransport::done(CuEvent event) const {
  const int result = libraries_->cuEventQuery(event);
  if (result == kCuNotReady || (result >= kCuFirstCaptureError && result <= kCuLastCaptureError)) return false;
  cuda(result, "cuEventQuery");
  return true;
}

bool NcclTransport::finish(const Group& group, uint64_t epoch, Clock::time_point deadline) {
  const Mark& m = mark(group, epoch);
  while (!done(m.done)) {
    if (health().broken()) return true;
    if (Clock::now() > deadline) return false;
    std::this_thread::sleep_for(kPoll);
  }
  return true;
}

State NcclTransport::state(const Group& group, uint64_t epoch) {
  std::lock_guard<std::mutex> lock(marks_mutex_);
  if (group.marks.empty()) return State::kDone;
  const Entered entered(*libraries_, context_);
  const Mark& m = mark(group, epoch);
  if (done(m.done)) return State::kDone;
  return done(m.ready) ? State::kRunning : State::kQueued;
}

std::vector<int> NcclTransport::missing(const Group& group, uint64_t) {
  std::vector<int> peers;
  for (const Message& x : group.messages) {
    if (std::find(peers.begin(), peers.end(), x.peer) == peers.end()) peers.push_back(x.peer);
  }
  return peers;
}

// To ask for an event breaks off a capture that another thread has begun in CUDA's strictest mode, which is torch's.
void NcclTransport::watched() {
  int mode = kCuCaptureRelaxed;
  libraries_->cuThreadExchangeStreamCaptureMode(&mode);
}

void NcclTransport::inspect() {
  std::unique_lock<std::mutex> lock(comm_->mutex, std::try_to_lock);
  if (!lock.owns_lock() || gone() || comm_->handle == nullptr) return;
  int result = kNcclSuccess;
  check_nccl(*libraries_, libraries_->ncclCommGetAsyncError(comm_->handle, &result), "ncclCommGetAsyncError");
  check_nccl(*libraries_, result, "NCCL");
}

// Whoever is inside a call aside ends the communicator when it comes back, if ever. A caller that is stuck in one of
// its own can only be released by an abort.
void NcclTransport::abort(const std::string&) {
  if (comm_->gone.exchange(true)) return;
  const auto patience = Clock::now() + kAbortPatience;
  std::unique_lock<std::mutex> lock(comm_->mutex, std::try_to_lock);
  while (!lock.owns_lock() && !comm_->aside && Clock::now() < patience) {
    std::this_thread::sleep_for(kPoll);
    lock.try_lock();
  }
  if ((!lock.owns_lock() && comm_->aside) || comm_->handle == nullptr) return;
  const Entered entered(*libraries_, context_);
  end(comm_->handle);
  if (lock.owns_lock()) comm_->handle = nullptr;
}

bool NcclTransport::run_dry() const {
  const auto deadline = Clock::now() + kAbortPatience;
  while (libraries_->cuStreamQuery(stream_) == kCuNotReady) {
    if (Clock::now() > deadline) return false;
    std::this_thread::sleep_for(kPoll);
  }
  return true;
}

void NcclTransport::close() {
  if (gone()) return;
  // To destroy a communicator waits for its operations, and nobody may be there to carry out the other half of them.
  if (health().broken()) return abort("closed after a failure");
  const Entered entered(*libraries_, context_);
  if (!settled() || !run_dry()) return abort("closed with messages under way");
  std::lock_guard<std::mutex> lock(comm_->mutex);
  if (comm_->gone.exchange(true) || comm_->handle == nullptr) return;
  // Not abort: a peer may still be reading what this rank has sent.
  check_nccl(*libraries_, libraries_->ncclCommDestroy(comm_->handle), "ncclCommDestroy");
}

}  // namespace adf

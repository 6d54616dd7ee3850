// The entry points of libcuda.so.1, as its header declares them but with plain types.
//
// Streams are non-blocking ones; a context's default stream is one more of that kind. Contexts are the numbers of
// ranks.
#include "exports.hpp"
#include "machine.hpp"

using namespace fake;

namespace {

enum : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kInvalidContext = 201,
  kInvalidHandle = 400,
  kNotReady = 600,
  kCaptureUnsupported = 900,
};
constexpr unsigned kNonBlocking = 1;
constexpr int kRelaxed = 2;
constexpr uintptr_t kFirstContext = 0x50000001;

}  // namespace

FAKE_API int cuInit(unsigned) { return kSuccess; }

FAKE_API int cuCtxGetCurrent(void** context) {
  note_call(__func__);
  const int current = current_context();
  *context = current < 0 ? nullptr : reinterpret_cast<void*>(kFirstContext + current);
  return kSuccess;
}

FAKE_API int cuCtxSetCurrent(void* context) {
  note_call(__func__);
  current_context() = context ? static_cast<int>(reinterpret_cast<uintptr_t>(context) - kFirstContext) : -1;
  return kSuccess;
}

FAKE_API int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return kSuccess;
}

FAKE_API int cuStreamCreateWithPriority(void** stream, unsigned flags, int) {
  Lock lock(machine().mutex);
  if (current_context() < 0) return kInvalidContext;
  if (flags != kNonBlocking) machine().misuse("a stream that is not non-blocking waits for the default stream");
  *stream = machine().add_stream(current_context());
  return kSuccess;
}

FAKE_API int cuStreamDestroy_v2(void* stream) {
  Lock lock(machine().mutex);
  auto found = stream ? machine().stream(stream) : nullptr;
  if (!found) return kInvalidHandle;
  found->destroyed = true;
  return kSuccess;
}

FAKE_API int cuStreamQuery(void* stream) {
  if (machine().null_mode) return kSuccess;
  Lock lock(machine().mutex);
  auto found = machine().stream(stream);
  if (!found) return kInvalidHandle;
  if (!found->idle()) return kNotReady;
  join(machine().host(found->context).clock, found->clock);
  return kSuccess;
}

FAKE_API int cuStreamWaitEvent(void* stream, void* event, unsigned) {
  note_call(__func__);
  if (machine().null_mode) return kSuccess;
  Lock lock(machine().mutex);
  auto waiting = machine().stream(stream);
  auto awaited = machine().events.find(event);
  if (!waiting || !awaited) return kInvalidHandle;
  // Bound to the latest record made before this call; an event that was never recorded is over.
  auto recorded = awaited->latest;
  if (!recorded) return kSuccess;
  waiting->push("wait for an event", machine().host(waiting->context).clock, [recorded](Stream& stream, Lock& lock) {
    if (stream.block(lock, "the event's record", [recorded] { return recorded->done; }))
      join(stream.clock, recorded->clock);
  });
  return kSuccess;
}

FAKE_API int cuEventCreate(void** event, unsigned) {
  Lock lock(machine().mutex);
  if (current_context() < 0) return kInvalidContext;
  *event = machine().events.add(std::make_shared<Event>(Event{current_context(), nullptr}));
  return kSuccess;
}

FAKE_API int cuEventDestroy_v2(void* event) {
  Lock lock(machine().mutex);
  return machine().events.remove(event) ? kSuccess : kInvalidHandle;
}

FAKE_API int cuEventRecord(void* event, void* stream) {
  note_call(__func__);
  if (machine().null_mode) return kSuccess;
  Lock lock(machine().mutex);
  auto found = machine().events.find(event);
  auto recording = machine().stream(stream);
  if (!found || !recording || found->context != recording->context) return kInvalidHandle;
  auto recorded = found->latest = std::make_shared<Recorded>();
  recording->push("record an event", machine().host(recording->context).clock, [recorded](Stream& stream, Lock&) {
    recorded->clock = stream.clock;
    recorded->done = true;
  });
  return kSuccess;
}

FAKE_API int cuEventQuery(void* event) {
  note_call(__func__);
  if (machine().null_mode) return kSuccess;
  Lock lock(machine().mutex);
  auto found = machine().events.find(event);
  if (!found) return kInvalidHandle;
  if (machine().capturing && capture_mode() != kRelaxed) {
    machine().misuse("an enquiry has broken off the capture of another thread");
    return kCaptureUnsupported;
  }
  if (!found->latest) return kSuccess;
  if (!found->latest->done) return kNotReady;
  join(machine().host(found->context).clock, found->latest->clock);
  return kSuccess;
}

FAKE_API int cuThreadExchangeStreamCaptureMode(int* mode) {
  std::swap(*mode, capture_mode());
  return kSuccess;
}

FAKE_API int cuMemcpyDtoDAsync_v2(uintptr_t target, uintptr_t source, size_t bytes, void* handle) {
  if (machine().null_mode) return kSuccess;
  Lock lock(machine().mutex);
  auto found = machine().stream(handle);
  if (!found) return kInvalidHandle;
  found->push("copy", machine().host(found->context).clock, [target, source, bytes](Stream& stream, Lock& lock) {
    auto* to = reinterpret_cast<char*>(target);
    const auto* from = reinterpret_cast<const char*>(source);
    const std::string what = "copy of " + std::to_string(bytes) + " bytes";
    stream.access(false, from, bytes, what);
    stream.access(true, to, bytes, what);
    lock.unlock();
    copy(stream, to, from, bytes);
    lock.lock();
  });
  return kSuccess;
}

FAKE_API int cuGetErrorString(int code, const char** text) {
  switch (code) {
    case kSuccess:
      *text = "no error";
      break;
    case kInvalidContext:
      *text = "invalid device context";
      break;
    case kInvalidHandle:
      *text = "invalid resource handle";
      break;
    case kNotReady:
      *text = "device not ready";
      break;
    default:
      *text = "unknown error";
      return kInvalidValue;
  }
  return kSuccess;
}

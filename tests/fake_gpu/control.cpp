// What tests tell the double and ask it: kernels, host accesses, delays, faults and reports.
#include <cstring>

#include "communicator.hpp"
#include "exports.hpp"

using namespace fake;

namespace {

// Bytes that a kernel reads or writes; `value` is what every byte should be, or becomes; -1: any, or left as it is.
struct Range {
  char* begin;
  size_t bytes;
  int value;
};

// The detector judges these accesses; a sanitizer would only repeat it for the schedules that are wrong on purpose.
#if defined(__SANITIZE_THREAD__)
__attribute__((no_sanitize("thread")))
#endif
int first_wrong(const Range& range) {
  const volatile char* data = range.begin;
  for (size_t i = 0; i < range.bytes; i++)
    if (data[i] != static_cast<char>(range.value)) return static_cast<unsigned char>(data[i]);
  return -1;
}

#if defined(__SANITIZE_THREAD__)
__attribute__((no_sanitize("thread")))
#endif
void fill(const Range& range) {
  volatile char* data = range.begin;
  for (size_t i = 0; i < range.bytes; i++) data[i] = static_cast<char>(range.value);
}

// Looks at a range; what it should not have found is noted.
void look(const Range& range, const std::string& name, Lock& lock) {
  if (range.value < 0) return;
  lock.unlock();
  const int found = first_wrong(range);
  lock.lock();
  if (found >= 0)
    machine().wrong_reads.push_back(name + " read " + std::to_string(found) + ", not " + std::to_string(range.value));
}

void give(const std::string& text, char* buffer, size_t size) {
  if (!size) return;
  const size_t bytes = std::min(text.size(), size - 1);
  std::memcpy(buffer, text.data(), bytes);
  buffer[bytes] = 0;
}

std::string lines(const std::vector<std::string>& list) {
  std::string text;
  for (const auto& line : list) text += line + "\n";
  return text;
}

}  // namespace

// Reads and then writes in one operation of a stream; reads twice, so that a writer that does not wait may be seen.
// What this thread has called since it asked last: "name count" lines.
FAKE_API void fake_calls(char* buffer, size_t size) {
  std::vector<std::string> found;
  for (const auto& [name, count] : calls()) found.push_back(name + " " + std::to_string(count));
  calls().clear();
  give(lines(found), buffer, size);
}

FAKE_API int fake_launch(void* handle, const char* name, const Range* reads, int num_reads, const Range* writes,
                         int num_writes) {
  if (machine().null_mode) return 0;
  Lock lock(machine().mutex);
  auto stream = machine().stream(handle);
  if (!stream) return 400;
  const std::vector<Range> in(reads, reads + num_reads), out(writes, writes + num_writes);
  stream->push(name, machine().host(stream->context).clock,
               [in, out, name = std::string(name)](Stream& stream, Lock& lock) {
                 for (const auto& range : in) stream.access(false, range.begin, range.bytes, name);
                 for (const auto& range : out) stream.access(true, range.begin, range.bytes, name);
                 for (int look_twice = 0; look_twice < 2; look_twice++) {
                   for (const auto& range : in) look(range, name, lock);
                   lock.unlock();
                   stream.dawdle();
                   lock.lock();
                 }
                 lock.unlock();
                 for (const auto& range : out)
                   if (range.value >= 0) fill(range);
                 lock.lock();
               });
  return 0;
}

// The same by the calling host thread, at once.
FAKE_API void fake_host(const char* name, const Range* reads, int num_reads, const Range* writes, int num_writes) {
  Lock lock(machine().mutex);
  HostTask& host = machine().host(current_context());
  auto moment = std::make_shared<Moment>(Moment{host.id, ++host.ops, host.clock[host.id], machine().launches++,
                                                host.clock, "rank " + std::to_string(current_context()) + " host"});
  for (int i = 0; i < num_reads; i++) {
    machine().detector.access({moment, 0, false, name}, reads[i].begin, reads[i].bytes);
    look(reads[i], name, lock);
  }
  for (int i = 0; i < num_writes; i++) {
    machine().detector.access({moment, 0, true, name}, writes[i].begin, writes[i].bytes);
    if (writes[i].value >= 0) fill(writes[i]);
  }
}

FAKE_API void fake_name(const void* begin, size_t bytes, const char* label) {
  Lock lock(machine().mutex);
  machine().detector.name(begin, bytes, label);
}

// Operations of streams made from now on take up to `most_us` longer, by random numbers of `seed`.
FAKE_API void fake_delays(int most_us, unsigned seed) {
  Lock lock(machine().mutex);
  machine().max_delay_us = most_us;
  machine().seed = seed;
}

FAKE_API void fake_null(int on) { machine().null_mode = on; }

FAKE_API void fake_version(int version) {
  Lock lock(machine().mutex);
  nccl().version = version;
}

// Registrations by a rank fail; -1: nobody's.
FAKE_API void fake_refuse_windows(int rank) {
  Lock lock(machine().mutex);
  nccl().refuse_windows = rank;
}

// Groups of communicators that do not block are launched at the n-th enquiry for errors after them.
FAKE_API void fake_enquiries(int count) {
  Lock lock(machine().mutex);
  nccl().enquiries = count;
}

// From now on, or no longer, some thread captures a graph in CUDA's strictest mode.
FAKE_API void fake_capture(int on) {
  Lock lock(machine().mutex);
  machine().capturing = on;
}

// What the communicators of a rank were made with, as maxCTAs; 0: there is none, or it was left open.
FAKE_API int fake_max_ctas(int rank) {
  Lock lock(machine().mutex);
  for (const auto& [_, comm] : nccl().communicators.all())
    if (comm->context == rank) return comm->max_ctas;
  return 0;
}

// An asynchronous error on every communicator of a rank.
FAKE_API void fake_fail(int rank, int result) {
  Lock lock(machine().mutex);
  for (const auto& [_, comm] : nccl().communicators.all())
    if (comm->context == rank) comm->error = comm->fail(static_cast<Result>(result), "a failure that a test ordered");
}

// Lets all streams run dry. What each is stuck in, a line each, if none could move for `grace_ms`; else nothing.
FAKE_API void fake_drain(int grace_ms, char* buffer, size_t size) {
  Lock lock(machine().mutex);
  give(machine().drain(lock, grace_ms), buffer, size);
}

// Racing pairs, one a line: kind, earlier access, later access, memory, separated by tabs. Returns their number.
FAKE_API int fake_races(char* buffer, size_t size) {
  Lock lock(machine().mutex);
  const auto races = machine().detector.races();
  std::string text;
  for (const auto& race : races) text += race.kind + "\t" + race.first + "\t" + race.second + "\t" + race.memory + "\n";
  give(text, buffer, size);
  return static_cast<int>(races.size());
}

FAKE_API void fake_wrong_reads(char* buffer, size_t size) {
  Lock lock(machine().mutex);
  give(lines(machine().wrong_reads), buffer, size);
}

// Calls that the double carried out although the library would block, fail or misbehave.
FAKE_API void fake_misuses(char* buffer, size_t size) {
  Lock lock(machine().mutex);
  give(lines(machine().misuses), buffer, size);
}

// Ends what is stuck and forgets everything: handles, memory, reports, settings.
FAKE_API void fake_reset() {
  machine().reset();
  Lock lock(machine().mutex);
  nccl().reset();
  machine().max_delay_us = 0;
  machine().seed = 0;
  machine().null_mode = false;
}

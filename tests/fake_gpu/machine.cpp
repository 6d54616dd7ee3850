#include "machine.hpp"

#include <algorithm>
#include <chrono>

namespace fake {

Machine& machine() {
  // Never destroyed: streams may outlive main().
  static Machine* const it = new Machine;
  return *it;
}

int& current_context() {
  thread_local int context = -1;
  return context;
}

int& capture_mode() {
  thread_local int mode = 0;
  return mode;
}

#if defined(__SANITIZE_THREAD__)
__attribute__((no_sanitize("thread")))
#endif
void copy(Stream& stream, void* target, const void* source, size_t bytes) {
  auto* to = static_cast<volatile char*>(target);
  auto* from = static_cast<const volatile char*>(source);
  for (size_t i = 0; i < bytes; i++) {
    if (i == bytes / 2) stream.dawdle();
    to[i] = from[i];
  }
}

Stream::Stream(int context, std::string label)
    : context(context), label(std::move(label)), task(machine().tasks++), random_(machine().seed) {
  for (char c : this->label) random_.seed(random_() * 31 + c);
}

Stream::~Stream() {
  {
    Lock lock(machine().mutex);
    stop_ = true;
  }
  wake.notify_all();
  if (thread_.joinable()) thread_.join();
}

void Stream::push(std::string what, const Clock& host, Body body) {
  queue_.push_back({std::move(what), machine().launches++, host, std::move(body)});
  if (!thread_.joinable()) thread_ = std::thread([this] { run(); });
  wake.notify_all();
}

void Stream::run() {
  Lock lock(machine().mutex);
  for (;;) {
    wake.wait(lock, [this] { return stop_ || !queue_.empty(); });
    if (queue_.empty()) return;
    Operation operation = std::move(queue_.front());
    queue_.pop_front();
    busy_ = true;
    ops_++;
    launch_ = operation.launch;
    doing_ = operation.what;
    join(clock, operation.host);
    tick(clock, task);
    lock.unlock();
    dawdle();
    lock.lock();
    operation.body(*this, lock);
    busy_ = false;
    machine().notify();
  }
}

bool Stream::block(Lock& lock, std::string reason, std::function<bool()> ready) {
  reason_ = std::move(reason);
  ready_ = std::move(ready);
  machine().changed.notify_all();
  wake.wait(lock, [this] { return machine().released || ready_(); });
  const bool held = ready_();
  ready_ = nullptr;
  return held;
}

void Stream::access(bool write, const void* begin, size_t bytes, std::string what, int part, const Clock* at) {
  const Clock& known = at ? *at : clock;
  auto moment = std::make_shared<Moment>(
      Moment{task, ops_, known[task], launch_, known, label + ", operation " + std::to_string(ops_)});
  machine().detector.access({std::move(moment), part, write, std::move(what)}, begin, bytes);
}

void Stream::dawdle() {
  const int most = machine().max_delay_us;
  if (most) std::this_thread::sleep_for(std::chrono::microseconds(random_() % most));
}

std::string Stream::status() const {
  return label + " is stuck in operation " + std::to_string(ops_) + ", " + doing_ + ": waits for " + reason_;
}

HostTask& Machine::host(int context) {
  thread_local std::map<int, HostTask> tasks_by_context;
  thread_local unsigned generation = 0;
  if (generation != generation_) {
    tasks_by_context.clear();
    generation = generation_;
  }
  HostTask& task = tasks_by_context[context];
  if (task.id < 0) task.id = tasks++;
  tick(task.clock, task.id);
  return task;
}

std::shared_ptr<Stream> Machine::stream(void* handle) {
  if (!handle) {
    const int context = current_context();
    if (context < 0) return nullptr;
    void*& standard = default_streams_[context];
    if (!standard)
      standard = streams.add(std::make_shared<Stream>(context, "rank " + std::to_string(context) + " default stream"));
    handle = standard;
  }
  auto found = streams.find(handle);
  return found && !found->destroyed ? found : nullptr;
}

void* Machine::add_stream(int context) {
  const int number = ++stream_counts_[context];
  return streams.add(
      std::make_shared<Stream>(context, "rank " + std::to_string(context) + " stream " + std::to_string(number)));
}

std::vector<std::shared_ptr<Stream>> Machine::everything() const {
  std::vector<std::shared_ptr<Stream>> all;
  for (const auto& [_, stream] : streams.all()) all.push_back(stream);
  std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a->label < b->label; });
  return all;
}

void Machine::notify() {
  for (const auto& [_, stream] : streams.all())
    if (released || stream->can_go_on()) stream->wake.notify_all();
  changed.notify_all();
}

std::string Machine::drain(Lock& lock, int grace_ms) {
  const auto all = everything();
  for (;;) {
    std::string report;
    bool working = false, moving = false;
    for (const auto& stream : all) {
      if (stream->idle()) continue;
      working = true;
      if (stream->stuck())
        report += stream->status() + "\n";
      else
        moving = true;
    }
    if (!working) return "";
    if (moving) {
      changed.wait(lock);
    } else if (changed.wait_for(lock, std::chrono::milliseconds(grace_ms)) == std::cv_status::timeout) {
      return report;
    }
  }
}

void Machine::reset() {
  std::vector<std::shared_ptr<Stream>> all;
  {
    Lock lock(mutex);
    released = true;
    notify();
    drain(lock, 1000);
    all = everything();
    streams.clear();
    events.clear();
    default_streams_.clear();
    stream_counts_.clear();
    detector.clear();
    misuses.clear();
    wrong_reads.clear();
    capturing = false;
    generation_++;
    launches = 0;
    tasks = 0;
  }
  // Their threads end here, outside the lock.
  all.clear();
  Lock lock(mutex);
  released = false;
}

}  // namespace fake

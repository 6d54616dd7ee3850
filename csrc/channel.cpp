#include "channel.hpp"

#include <pthread.h>

#include <algorithm>

#include "edges.hpp"

namespace adf {
namespace {

// More operations in one NCCL group can diverge between ranks.
constexpr size_t kMostMessages = 256;
constexpr auto kPause = std::chrono::milliseconds(100);
// Counts the forks above this process: threads and communicators do not come along.
std::atomic<int> forks{0};
const int watching_forks = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });

}  // namespace

Channel::Channel(std::shared_ptr<Transport> transport, double timeout_s, std::vector<int> pids, bool use_pidfd,
                 std::vector<int> names, std::function<void()> pause)
    : transport_(std::move(transport)),
      timeout_s_(timeout_s),
      pause_(std::move(pause)),
      fork_count_(forks.load() + watching_forks),
      pids_(pids.begin(), pids.end()),
      left_(transport_->size(), false) {
  if (!pids.empty() && static_cast<int>(pids.size()) != transport_->size()) {
    throw std::invalid_argument("pids must have one entry for each rank, or none");
  }
  if (!names.empty() && static_cast<int>(names.size()) != transport_->size()) {
    throw std::invalid_argument("ranks must have one name for each rank, or none");
  }
  transport_->set_names(std::move(names));
  watchdog_ = std::make_unique<Watchdog>(
      pids_, use_pidfd, [this] { transport_->watched(); }, [this](const std::vector<int>& ended) { look(ended); });
}

Channel::~Channel() {
  if (forked()) {
    // In a forked child there are no threads to join and nothing to tell the peers of.
    watchdog_.release();
    new std::shared_ptr<Transport>(std::move(transport_));
    return;
  }
  if (!closed_) leave("it was dropped without being closed");
  watchdog_->stop();
  // Slots and buffers go next: nothing may still be copying.
  try {
    transport_->close();
  } catch (const ExchangeError&) {
    // A destructor has nobody to tell.
  }
}

const Channel::Slot& Channel::at(int slot) const {
  if (slot < 0 || slot >= static_cast<int>(slots_.size()) || slots_[slot] == nullptr) {
    throw std::invalid_argument("no slot has the number " + std::to_string(slot) + ": it was released, or never made");
  }
  return *slots_[slot];
}

int Channel::add(const std::string& name, std::vector<Message> messages, int depth) {
  enter();
  if (depth < 1) throw std::invalid_argument("depth must be at least 1: got depth=" + std::to_string(depth));
  if (messages.size() > kMostMessages) {
    throw std::invalid_argument("slot '" + name + "' has " + std::to_string(messages.size()) +
                                " sends and receives; 256 at most, divide it");
  }
  auto slot = std::make_shared<Slot>();
  slot->name = name;
  slot->depth = depth;
  slot->sequence.assign(depth, 0);
  for (const Message& x : messages) {
    if (x.peer < 0 || x.peer >= transport_->size() || x.peer == transport_->rank()) {
      throw std::invalid_argument("slot '" + name + "' names peer " + std::to_string(x.peer) + "; peers of rank " +
                                  std::to_string(transport_->rank()) + " are the others below " +
                                  std::to_string(transport_->size()));
    }
    if (static_cast<int>(x.buffers.size()) != depth) {
      throw std::invalid_argument("slot '" + name + "' needs " + std::to_string(depth) +
                                  " buffers for each send and receive");
    }
    (x.sends ? slot->sends : slot->receives) = true;
    if (x.sends) slot->bytes += x.bytes;
  }
  slot->messages = std::move(messages);
  transport_->attach(slot.get());
  grow_history(slot->marks.size());
  // Others may be counting what slots have waited for.
  std::lock_guard<std::mutex> lock(mutex_);
  slots_.push_back(std::move(slot));
  return static_cast<int>(slots_.size()) - 1;
}

// Room for all posts that can be under way. The lane works in order, so what a full ring forgets is over.
void Channel::grow_history(size_t marks) {
  std::lock_guard<std::mutex> lock(mutex_);
  under_way_ += marks;
  if (under_way_ <= history_.size()) return;
  std::vector<Posted> larger(std::max(under_way_, 2 * history_.size()));
  for (uint64_t i = recorded_ - std::min<uint64_t>(recorded_, history_.size()); i < recorded_; ++i) {
    larger[i % larger.size()] = std::move(history_[i % history_.size()]);
  }
  history_ = std::move(larger);
}

bool Channel::forked() const { return forks.load(std::memory_order_relaxed) != fork_count_; }

void Channel::enter() {
  if (forked()) {
    throw ExchangeError("the exchange does not survive fork(): start processes with spawn, or patch in the child");
  }
  if (transport_->health().broken()) raise();
  if (closed_) throw ExchangeError("the exchange is closed");
}

void Channel::raise() {
  told_ = true;
  throw ExchangeError(transport_->health().reason());
}

Clock::time_point Channel::deadline() const {
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(timeout_s_));
}

template <typename Attempt>
bool Channel::patiently(Clock::time_point deadline, Attempt attempt) {
  while (true) {
    const auto now = Clock::now(), until = pause_ ? std::min(deadline, now + kPause) : deadline;
    if (attempt(until)) return true;
    if (until == deadline) return false;
    pause_();
  }
}

void Channel::acquire(int slot, Stream stream) {
  enter();
  Slot& s = at(slot);
  if (s.posted < static_cast<uint64_t>(s.depth)) return;
  ADF_EDGE(Edge::WriteAfterSend, order_after(&s, s.posted - s.depth, stream));
}

void Channel::guard_order(const Slot& slot) {
  Phase* phase = slot.order;
  const Slot& next = *slots_[phase->slots[phase->cursor]];
  if (&next != &slot) {
    throw ExchangeError("slots are posted in their frozen order: '" + next.name + "' is next, not '" + slot.name + "'");
  }
  if (slot.depth == 1 && slot.receives && slot.posted > slot.waited) {
    throw ExchangeError("slot '" + slot.name +
                        "' has depth 1: wait for it and read it before it is posted again, or give it depth 2");
  }
  phase->cursor = (phase->cursor + 1) % phase->slots.size();
}

void Channel::post(int slot, Stream stream) {
  enter();
  Slot& s = at(slot);
  if (s.order == nullptr) {
    throw std::invalid_argument("slot '" + s.name + "' is posted after freeze, not before");
  }
  settle(place(s, s.posted));
  guard_order(s);
  post_now(slots_[slot], stream);
}

void Channel::settle(const std::string& where) {
  bool opened;
  try {
    opened = patiently(deadline(), [&](auto until) { return transport_->opened(until); });
  } catch (const ExchangeError& error) {
    fail(where + ": " + error.what());
    raise();
  }
  if (opened) return;
  fail(where + ": " + unconnected());
  raise();
}

void Channel::post_now(const std::shared_ptr<Slot>& slot, Stream stream) {
  const auto began = Clock::now();
  Slot& s = *slot;
  // Its mark is taken over now; on the host the transport still holds its buffers, too.
  if (s.posted >= s.marks.size()) finish(&s, s.posted - s.marks.size(), deadline());
  {
    std::lock_guard<std::mutex> lock(mutex_);
    history_[recorded_++ % history_.size()] = {slot, s.posted, began};
    ++s.posted;
  }
  try {
    transport_->submit(s, s.posted - 1, stream);
  } catch (const ExchangeError& error) {
    fail(place(s, s.posted - 1) + ": " + error.what());
    raise();
  }
  s.sequence[(s.posted - 1) % s.depth] = ++sequence_;
  std::lock_guard<std::mutex> lock(mutex_);
  ++s.submitted;
  ++stats_.posts;
  stats_.sent_bytes += s.bytes;
  stats_.post_us += microseconds_since(began);
}

void Channel::order_after(Slot* slot, uint64_t epoch, Stream stream) {
  uint64_t& ordered = ordered_[stream];
  const uint64_t sequence = slot->sequence[epoch % slot->depth];
  if (!transport_->on_host() && ordered >= sequence) {
    std::lock_guard<std::mutex> lock(mutex_);
    ++stats_.waits_elided;
    return;
  }
  bool there;
  try {
    there = patiently(deadline(), [&](auto until) { return transport_->order(*slot, epoch, stream, until); });
  } catch (const ExchangeError& error) {
    fail(place(*slot, epoch) + ": " + error.what());
    raise();
  }
  if (!there) fail(late(*slot, epoch, timeout_s_));
  if (transport_->health().broken()) raise();
  ordered = std::max(ordered, sequence);
}

void Channel::wait(int slot, Stream stream, int lag) {
  enter();
  Slot& s = at(slot);
  if (lag < 0 || lag >= s.depth) {
    throw std::invalid_argument("lag must be less than the depth: got lag=" + std::to_string(lag) +
                                ", depth=" + std::to_string(s.depth) + " for slot '" + s.name + "'");
  }
  const int64_t epoch = static_cast<int64_t>(s.posted) - 1 - lag;
  const auto began = Clock::now();
  if (epoch >= 0) {
    ADF_EDGE(Edge::ReadAfterRecv, order_after(&s, epoch, stream));
    s.waited = std::max(s.waited, static_cast<uint64_t>(epoch) + 1);
  }
  const double took = microseconds_since(began);
  std::lock_guard<std::mutex> lock(mutex_);
  stats_.wait_us += took;
  s.wait_us += took;
}

// An epoch whose mark was taken over is over.
void Channel::finish(Slot* slot, int64_t epoch, Clock::time_point deadline) {
  const int64_t posted = static_cast<int64_t>(slot->posted);
  if (epoch < 0 || epoch >= posted || epoch < posted - static_cast<int64_t>(slot->marks.size())) return;
  const auto began = Clock::now();
  bool there = true;
  try {
    ADF_EDGE(Edge::HostAfterDone,
             there = patiently(deadline, [&](auto until) { return transport_->finish(*slot, epoch, until); }));
  } catch (const ExchangeError& error) {
    fail(place(*slot, epoch) + ": " + error.what());
    raise();
  }
  if (!there) fail(late(*slot, epoch, microseconds_since(began) / 1e6));
  if (transport_->health().broken()) raise();
}

void Channel::drain(const std::vector<int>& slots) {
  enter();
  for (int number : slots) {
    Slot& s = at(number);
    for (int back = s.depth; back > 0; --back) finish(&s, static_cast<int64_t>(s.posted) - back, deadline());
  }
}

void Channel::put_away() {
  closed_ = true;
  watchdog_->stop();
  transport_->close();
}

void Channel::close(double patience_s) {
  if (forked() || closed_) return;
  const auto patience =
      Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(patience_s));
  try {
    for (const auto& slot : slots_) {
      if (slot == nullptr || transport_->health().broken()) continue;
      for (int back = slot->depth; back > 0; --back) {
        finish(slot.get(), static_cast<int64_t>(slot->posted) - back, patience);
      }
    }
  } catch (const ExchangeError&) {
    told_ = false;  // Raised below, once everything is put away.
  } catch (...) {
    leave("it was interrupted while it closed");
    put_away();
    throw;
  }
  put_away();
  if (transport_->health().broken() && !told_) raise();
}

}  // namespace adf

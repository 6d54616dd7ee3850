#include "shm_transport.hpp"

#include <sched.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>

namespace adf {
namespace {

// Bells are rung for everything; this is a safety net.
constexpr auto kNap = std::chrono::milliseconds(200);
constexpr auto kSpin = std::chrono::microseconds(50);

// FNV-1a: names a slot in a message's header.
uint32_t key_of(const std::string& name) {
  uint32_t hash = 2166136261u;
  for (unsigned char c : name) hash = (hash ^ c) * 16777619u;
  return hash;
}

int cores() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

// While the caller waits it does the progress thread's work, which then need not be woken.
class ShmTransport::Driving {
 public:
  explicit Driving(ShmTransport* t) : t_(t) {
    t_->driving_ = true;
    t_->ask_for_worker();
  }
  ~Driving() {
    t_->driving_ = false;
    if (t_->ask_for_worker()) t_->segments_[t_->rank()]->inbox().worker.ring();
  }

 private:
  ShmTransport* t_;
};

ShmTransport::ShmTransport(int rank, int size, uint64_t token, const ShmOptions& options)
    : Transport(rank, size), token_(token), options_(options), spin_(size <= cores() ? kSpin : kSpin / 50) {
  if (options.ring_bytes < 2 * kSmall) throw std::invalid_argument("ring_bytes must be at least 131072");
  for (int i = 0; i < size; ++i) segments_.push_back(std::make_unique<Segment>());
  segments_[rank]->create(size, options.ring_bytes, token);
}

ShmTransport::~ShmTransport() { join_worker(); }

std::pair<int, int> ShmTransport::address() const { return {getpid(), segments_[rank()]->fd()}; }

void ShmTransport::connect(const std::vector<std::pair<int, int>>& addresses) {
  if (static_cast<int>(addresses.size()) != size())
    throw std::invalid_argument("connect needs an address of each rank");
  Segment& mine = *segments_[rank()];
  for (int r = 0; r < size(); ++r) {
    processes_.emplace_back(addresses[r].first, true);
    if (r == rank()) continue;
    segments_[r]->open(addresses[r].first, addresses[r].second, size(), options_.ring_bytes, token_);
    uint64_t found = 0;
    iovec here{&found, sizeof found};
    iovec there{reinterpret_cast<void*>(segments_[r]->inbox().probe), sizeof found};
    const bool readable =
        options_.direct && process_vm_readv(processes_[r].pid(), &here, 1, &there, 1, 0) == sizeof found;
    mine.ring(r).readable = readable && found == token_;
    lines_.push_back({r, true, segments_[r].get(), rank(), {}, {}});
    lines_.push_back({r, false, &mine, r, {}, {}});
  }
  worker_ = std::thread([this] { work(); });
}

void ShmTransport::attach(Group* group) {
  Lock lock(mutex_);
  names_[key_of(group->name)] = group->name;
  for (int i = 0; i < group->depth; ++i) {
    if (free_marks_.empty()) {
      free_marks_.push_back(static_cast<int>(open_.size()));
      open_.push_back(0);
    }
    group->marks.push_back(free_marks_.back());
    free_marks_.pop_back();
  }
}

void ShmTransport::detach(Group* group) {
  Lock lock(mutex_);
  free_marks_.insert(free_marks_.end(), group->marks.begin(), group->marks.end());
  group->marks.clear();
}

void ShmTransport::submit(const Group& group, uint64_t epoch, Stream) {
  Lock lock(mutex_);
  const int mark = group.marks[epoch % group.depth];
  const uint32_t key = key_of(group.name);
  open_[mark] = static_cast<int>(group.messages.size());
  for (const Message& x : group.messages) {
    for (Line& line : lines_) {
      if (line.peer != x.peer || line.sends != x.sends) continue;
      line.queue.push_back({&group, epoch, x.buffers[epoch % group.depth], x.bytes, mark, key});
      line.large += x.bytes > kSmall;
      if (x.sends) advance(&line, &lock, false);
    }
  }
  if (ask_for_worker()) segments_[rank()]->inbox().worker.ring();
}

bool ShmTransport::order(const Group& group, uint64_t epoch, Stream, Clock::time_point deadline) {
  const int mark = group.marks[epoch % group.depth];
  {
    Lock lock(mutex_);
    if (open_[mark] > 0) advance_all(&lock);
    if (open_[mark] == 0) return true;
    Driving driving(this);
    if (!wait_for(mark, &lock, deadline)) return false;
    if (open_[mark] == 0) return true;
  }
  inspect();
  return true;
}

// False at the deadline; true once the mark is complete or the exchange has stopped.
bool ShmTransport::wait_for(int mark, Lock* lock, Clock::time_point deadline) {
  Bell& bell = segments_[rank()]->inbox().caller;
  while (open_[mark] > 0 && !stopping()) {
    const uint32_t seen = bell.rings.load(std::memory_order_seq_cst);
    if (advance_all(lock)) continue;
    const auto now = Clock::now();
    if (now > deadline) return false;
    lock->unlock();
    while (bell.rings.load(std::memory_order_relaxed) == seen && Clock::now() - now < spin_) pause();
    const auto limit = std::min<std::chrono::nanoseconds>(kNap, deadline - now);
    if (bell.rings.load() == seen) bell.wait(seen, limit, options_.futex);
    lock->lock();
  }
  return true;
}

bool ShmTransport::finish(const Group& group, uint64_t epoch, Clock::time_point deadline) {
  return order(group, epoch, 0, deadline);
}

State ShmTransport::state(const Group& group, uint64_t epoch) {
  Lock lock(mutex_);
  if (group.marks.empty() || open_[group.marks[epoch % group.depth]] == 0) return State::kDone;
  return State::kRunning;
}

std::vector<int> ShmTransport::missing(const Group& group, uint64_t epoch) {
  Lock lock(mutex_);
  std::vector<int> peers;
  for (const Line& line : lines_) {
    const auto waits = [&](const Pending& p) { return p.group == &group && p.epoch == epoch; };
    if (std::any_of(line.queue.begin(), line.queue.end(), waits) ||
        std::any_of(line.announced.begin(), line.announced.end(), waits)) {
      if (std::find(peers.begin(), peers.end(), line.peer) == peers.end()) peers.push_back(line.peer);
    }
  }
  return peers;
}

// Of a rank that has closed its exchange, what is in this rank's ring can still be received, and nothing more.
void ShmTransport::inspect() {
  const uint32_t by = segments_[rank()]->inbox().stopped.load(std::memory_order_acquire);
  if (by > 0 && static_cast<int>(by) - 1 != rank()) {
    throw ExchangeError("rank " + name(static_cast<int>(by) - 1) +
                        " stopped the exchange: " + segments_[by - 1]->said());
  }
  Lock lock(mutex_);
  for (const Line& line : lines_) {
    if ((line.queue.empty() && line.announced.empty()) || line.busy || !left(line.peer)) continue;
    const Ring& ring = line.ring();
    if (line.sends ? line.queue.empty() && ring.copied.load() >= line.announced.back().ticket
                   : ring.head.load() != ring.tail.load()) {
      continue;
    }
    const Pending& p = line.queue.empty() ? line.announced.front() : line.queue.front();
    raise_left(p, line.peer);
  }
}

void ShmTransport::raise_left(const Pending& pending, int peer) const {
  throw ExchangeError("slot '" + pending.group->name + "' (exchange " + std::to_string(pending.epoch) +
                      ") waits for rank " + name(peer) + ", which has left the exchange: " + segments_[peer]->said());
}

void ShmTransport::leave(const std::string& reason) {
  Inbox& mine = segments_[rank()]->inbox();
  if (left(rank())) return;
  segments_[rank()]->say(reason);
  mine.left.store(1, std::memory_order_release);
  for (size_t r = 0; r < processes_.size(); ++r) segments_[r]->inbox().caller.ring();
}

bool ShmTransport::left(int rank) { return segments_[rank]->inbox().left.load(std::memory_order_acquire) != 0; }

void ShmTransport::abort(const std::string& reason) {
  if (aborted_.exchange(true)) return;
  segments_[rank()]->say(reason);
  for (size_t r = 0; r < processes_.size(); ++r) {
    Inbox& theirs = segments_[r]->inbox();
    uint32_t nobody = 0;
    theirs.stopped.compare_exchange_strong(nobody, static_cast<uint32_t>(rank()) + 1);
    theirs.caller.ring();
    theirs.worker.ring();
  }
}

void ShmTransport::close() {
  if (!health().broken()) leave("it was closed");
  segments_[rank()]->inbox().closed.store(1, std::memory_order_seq_cst);
  join_worker();
}

void ShmTransport::join_worker() {
  closing_ = true;
  if (!worker_.joinable()) return;
  segments_[rank()]->inbox().worker.ring();
  worker_.join();
}

bool ShmTransport::stopping() const {
  return health().broken() || closing_ || segments_[rank()]->inbox().stopped.load(std::memory_order_acquire) != 0;
}

// Says on the rings what this rank's progress thread is to be woken for; returns whether there is anything.
bool ShmTransport::ask_for_worker() {
  bool any = false;
  for (Line& line : lines_) {
    const bool wants = !driving_ && (line.sends ? !line.queue.empty() : line.large > 0);
    std::atomic<uint32_t>& flag = line.sends ? line.ring().writer_waits : line.ring().reader_waits;
    if ((flag.load(std::memory_order_relaxed) != 0) != wants) flag.store(wants, std::memory_order_seq_cst);
    any = any || wants;
  }
  return any;
}

void ShmTransport::work() {
  Bell& bell = segments_[rank()]->inbox().worker;
  Lock lock(mutex_);
  while (!closing_) {
    const uint32_t seen = bell.rings.load(std::memory_order_seq_cst);
    bool moved = false;
    try {
      moved = !driving_ && !stopping() && ask_for_worker() && advance_all(&lock);
    } catch (const std::exception& error) {
      const std::string reason = name() + ": " + error.what();
      if (health().fail(reason)) abort(reason);
    }
    if (moved) {
      ask_for_worker();
      segments_[rank()]->inbox().caller.ring();
      continue;
    }
    lock.unlock();
    bell.wait(seen, kNap, options_.futex);
    lock.lock();
  }
}

}  // namespace adf

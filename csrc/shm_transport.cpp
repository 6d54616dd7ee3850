#include "shm_transport.hpp"

#include <sched.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace adf {
namespace {

// Up to here a message is cheaper to copy twice than to announce.
constexpr size_t kSmall = size_t{64} << 10;
// What passes through a ring goes in pieces, so that one side writes while the other reads.
constexpr size_t kPiece = size_t{128} << 10;
constexpr size_t kPull = size_t{4} << 20;
// Bells are rung for everything; this is a safety net.
constexpr auto kNap = std::chrono::milliseconds(200);
constexpr auto kSpin = std::chrono::microseconds(50);

// FNV-1a: names a slot in a message's header.
uint32_t key_of(const std::string& name) {
  uint32_t hash = 2166136261u;
  for (unsigned char c : name) hash = (hash ^ c) * 16777619u;
  return hash;
}

void write_ring(char* data, size_t size, uint64_t at, const void* from, size_t bytes) {
  const size_t offset = at % size, first = std::min(bytes, size - offset);
  memcpy(data + offset, from, first);
  memcpy(data, static_cast<const char*>(from) + first, bytes - first);
}

void read_ring(const char* data, size_t size, uint64_t at, void* to, size_t bytes) {
  const size_t offset = at % size, first = std::min(bytes, size - offset);
  memcpy(to, data + offset, first);
  memcpy(static_cast<char*>(to) + first, data, bytes - first);
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
    pids_.push_back(addresses[r].first);
    if (r == rank()) continue;
    segments_[r]->open(addresses[r].first, addresses[r].second, size(), options_.ring_bytes, token_);
    uint64_t found = 0;
    iovec here{&found, sizeof found};
    iovec there{reinterpret_cast<void*>(segments_[r]->inbox().probe), sizeof found};
    const bool readable = options_.direct && process_vm_readv(pids_[r], &here, 1, &there, 1, 0) == sizeof found;
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
    throw ExchangeError("rank " + std::to_string(by - 1) +
                        " stopped the exchange: " + segments_[by - 1]->inbox().reason);
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
    throw ExchangeError("slot '" + p.group->name + "' (exchange " + std::to_string(p.epoch) + ") waits for rank " +
                        std::to_string(line.peer) +
                        ", which has left the exchange: " + segments_[line.peer]->inbox().reason);
  }
}

void ShmTransport::leave(const std::string& reason) {
  Inbox& mine = segments_[rank()]->inbox();
  if (left(rank())) return;
  strncpy(mine.reason, reason.c_str(), sizeof mine.reason - 1);
  mine.left.store(1, std::memory_order_release);
  for (size_t r = 0; r < pids_.size(); ++r) segments_[r]->inbox().caller.ring();
}

bool ShmTransport::left(int rank) { return segments_[rank]->inbox().left.load(std::memory_order_acquire) != 0; }

void ShmTransport::abort(const std::string& reason) noexcept {
  if (aborted_.exchange(true)) return;
  Inbox& mine = segments_[rank()]->inbox();
  strncpy(mine.reason, reason.c_str(), sizeof mine.reason - 1);
  for (size_t r = 0; r < pids_.size(); ++r) {
    Inbox& theirs = segments_[r]->inbox();
    uint32_t nobody = 0;
    theirs.stopped.compare_exchange_strong(nobody, static_cast<uint32_t>(rank()) + 1);
    theirs.caller.ring();
    theirs.worker.ring();
  }
}

void ShmTransport::close() {
  if (!health().broken()) leave("it was closed");
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
    } catch (const ExchangeError& error) {
      const std::string reason = "rank " + std::to_string(rank()) + ": " + error.what();
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

bool ShmTransport::advance_all(Lock* lock) {
  bool moved = false;
  for (Line& line : lines_) moved = advance(&line, lock, true) || moved;
  return moved;
}

bool ShmTransport::advance(Line* line, Lock* lock, bool everything) {
  if (line->busy || (line->queue.empty() && line->announced.empty())) return false;
  struct Busy {
    Line* line;
    ~Busy() { line->busy = false; }
  } busy{line};
  line->busy = true;
  return line->sends ? send_some(line, lock, everything) : receive_some(line, lock);
}

void ShmTransport::notify(int peer, const std::atomic<uint32_t>& worker_waits) {
  Inbox& inbox = segments_[peer]->inbox();
  inbox.caller.ring();
  if (worker_waits.load(std::memory_order_seq_cst) != 0) inbox.worker.ring();
}

bool ShmTransport::send_some(Line* line, Lock* lock, bool everything) {
  Ring& ring = line->ring();
  char* data = line->segment->data(line->source);
  const size_t size = line->segment->ring_bytes();
  bool moved = false;
  while (!line->announced.empty() && ring.copied.load(std::memory_order_acquire) >= line->announced.front().ticket) {
    complete(line->announced.front().mark);
    line->announced.pop_front();
    moved = true;
  }
  while (!line->queue.empty() && !stopping()) {
    Pending& p = line->queue.front();
    uint64_t head = ring.head.load(std::memory_order_relaxed);
    const size_t room = size - (head - ring.tail.load(std::memory_order_seq_cst));
    const bool large = p.bytes > kSmall, direct = large && ring.readable.load() != 0;
    if (large && !direct && !everything) break;
    size_t taken = 0;
    if (!p.begun) {
      // A small message goes in one piece.
      if (room < sizeof(MessageHeader) + (large ? 0 : p.bytes)) break;
      const MessageHeader header{p.key, 0, p.epoch, p.bytes, direct ? reinterpret_cast<uint64_t>(p.buffer) : 0};
      write_ring(data, size, head, &header, sizeof header);
      taken = sizeof header;
      p.begun = true;
    }
    const size_t piece = direct ? 0 : std::min({p.bytes - p.moved, room - taken, kPiece});
    if (taken + piece == 0) break;
    if (large && piece > 0) lock->unlock();
    write_ring(data, size, head + taken, p.buffer + p.moved, piece);
    if (!lock->owns_lock()) lock->lock();
    p.moved += piece;
    ring.head.store(head + taken + piece, std::memory_order_seq_cst);
    notify(line->peer, ring.reader_waits);
    moved = true;
    if (direct) {
      p.ticket = ++line->tickets;
      line->announced.push_back(p);
    } else if (p.moved == p.bytes) {
      complete(p.mark);
    } else {
      continue;
    }
    line->large -= large;
    line->queue.pop_front();
  }
  return moved;
}

bool ShmTransport::receive_some(Line* line, Lock* lock) {
  Ring& ring = line->ring();
  const char* data = line->segment->data(line->source);
  const size_t size = line->segment->ring_bytes();
  bool moved = false;
  while (!line->queue.empty() && !stopping()) {
    Pending& p = line->queue.front();
    uint64_t tail = ring.tail.load(std::memory_order_relaxed);
    size_t there = ring.head.load(std::memory_order_seq_cst) - tail;
    const bool large = p.bytes > kSmall;
    if (!p.begun) {
      if (there < sizeof(MessageHeader)) break;
      MessageHeader header;
      read_ring(data, size, tail, &header, sizeof header);
      check_header(header, p, line->peer);
      tail += sizeof header;
      there -= sizeof header;
      p.begun = true;
      p.source = header.address;
    } else if (there == 0) {
      break;
    }
    bool whole = true;
    int error = 0;
    const size_t piece = p.source != 0 ? 0 : std::min({p.bytes - p.moved, there, kPiece});
    if (large) lock->unlock();
    if (p.source != 0) {
      whole = pull(p, pids_[line->peer], &error);
    } else {
      read_ring(data, size, tail, p.buffer + p.moved, piece);
      whole = (p.moved += piece) == p.bytes;
    }
    if (large) lock->lock();
    if (error != 0) {
      throw ExchangeError("slot '" + p.group->name + "' (exchange " + std::to_string(p.epoch) +
                          "): the memory of rank " + std::to_string(line->peer) +
                          " cannot be read: " + strerror(error));
    }
    if (p.source != 0 && !whole) break;
    ring.tail.store(tail + piece, std::memory_order_seq_cst);
    if (p.source != 0) ring.copied.fetch_add(1, std::memory_order_seq_cst);
    notify(line->peer, ring.writer_waits);
    moved = true;
    if (!whole) continue;
    complete(p.mark);
    line->large -= large;
    line->queue.pop_front();
  }
  return moved;
}

// Sizes and names are compared before the first byte is copied; the sender learns of it by the abort that follows.
void ShmTransport::check_header(const MessageHeader& header, const Pending& pending, int peer) const {
  if (header.key == pending.key && header.epoch == pending.epoch && header.bytes == pending.bytes) return;
  const auto name = names_.find(header.key);
  throw ExchangeError("rank " + std::to_string(rank()) + " expects " + std::to_string(pending.bytes) +
                      " bytes from rank " + std::to_string(peer) + " in slot '" + pending.group->name + "' (exchange " +
                      std::to_string(pending.epoch) + "), which sends " + std::to_string(header.bytes) +
                      " bytes in slot '" + (name == names_.end() ? "unknown here" : name->second) + "' (exchange " +
                      std::to_string(header.epoch) + "): ranks must patch the same model with the same options");
}

// False if the exchange stopped meanwhile, the sender died (the watchdog names it), or with `error` set.
bool ShmTransport::pull(const Pending& pending, pid_t pid, int* error) {
  size_t done = 0;
  while (done < pending.bytes) {
    if (stopping()) return false;
    const size_t piece = std::min(pending.bytes - done, kPull);
    iovec here{pending.buffer + done, piece};
    iovec there{reinterpret_cast<void*>(pending.source + done), piece};
    const ssize_t got = process_vm_readv(pid, &here, 1, &there, 1, 0);
    if (got <= 0) {
      *error = errno == ESRCH ? 0 : errno;
      return false;
    }
    done += static_cast<size_t>(got);
  }
  return true;
}

void ShmTransport::complete(int mark) {
  if (--open_[mark] == 0 && driving_) segments_[rank()]->inbox().caller.ring();
}

}  // namespace adf

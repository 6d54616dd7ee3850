// How messages move along the lines of a ShmTransport: through the ring, or straight out of the sender's memory.
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "shm_transport.hpp"

namespace adf {
namespace {

// What passes through a ring goes in pieces, so that one side writes while the other reads.
constexpr size_t kPiece = size_t{128} << 10;
constexpr size_t kPull = size_t{4} << 20;

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

}  // namespace

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
      whole = pull(p, processes_[line->peer], &error);
    } else {
      read_ring(data, size, tail, p.buffer + p.moved, piece);
      whole = (p.moved += piece) == p.bytes;
    }
    if (large) lock->lock();
    // Its buffers may have gone while they were read.
    if (p.source != 0 && segments_[line->peer]->inbox().closed.load(std::memory_order_seq_cst) != 0) {
      raise_left(p, line->peer);
    }
    if (error != 0) {
      throw ExchangeError("slot '" + p.group->name + "' (exchange " + std::to_string(p.epoch) +
                          "): the memory of rank " + name(line->peer) + " cannot be read: " + strerror(error));
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
  throw ExchangeError(this->name() + " expects " + std::to_string(pending.bytes) + " bytes from rank " +
                      this->name(peer) + " in slot '" + pending.group->name + "' (exchange " +
                      std::to_string(pending.epoch) + "), which sends " + std::to_string(header.bytes) +
                      " bytes in slot '" + (name == names_.end() ? "unknown here" : name->second) + "' (exchange " +
                      std::to_string(header.epoch) + "): ranks must patch the same model with the same options");
}

// False if the exchange stopped meanwhile, the sender died (the watchdog names it), or with `error` set.
bool ShmTransport::pull(const Pending& pending, const Process& sender, int* error) {
  size_t done = 0;
  while (done < pending.bytes) {
    if (stopping()) return false;
    const size_t piece = std::min(pending.bytes - done, kPull);
    iovec here{pending.buffer + done, piece};
    iovec there{reinterpret_cast<void*>(pending.source + done), piece};
    const ssize_t got = process_vm_readv(sender.pid(), &here, 1, &there, 1, 0);
    if (got <= 0) {
      const int found = errno;
      *error = found == ESRCH || sender.ended() ? 0 : found;
      return false;
    }
    done += static_cast<size_t>(got);
  }
  // Its number may have gone to another process meanwhile, whose memory this then was.
  return !sender.ended();
}

void ShmTransport::complete(int mark) {
  if (--open_[mark] == 0 && driving_) segments_[rank()]->inbox().caller.ring();
}

}  // namespace adf

// Groups of sends and receives: a rendezvous of the streams they were launched on.
//
// A send is over when its receiver has taken everything, which is stricter than the library's buffering; the only edge
// is from sender to receiver, which is all that the library promises.
#include <algorithm>

#include "communicator.hpp"

namespace fake {
namespace {

std::string label(const Communicator& comm, const Operation& operation) {
  const bool sends = operation.kind == Operation::kSend;
  const int from = sends ? comm.rank : operation.peer, to = sends ? operation.peer : comm.rank;
  return std::string(sends ? "send" : "recv") + " " + std::to_string(from) + "->" + std::to_string(to) + " of " +
         std::to_string(operation.bytes) + " bytes";
}

struct Run {
  Stream& stream;
  Lock& lock;
  Communicator& comm;
  Clock known;  // joined with what the parts of the group learn

  bool block(const std::string& reason, const std::function<bool()>& ready) {
    return stream.block(lock, reason, [&] { return comm.aborted || ready(); }) && !comm.aborted;
  }

  std::shared_ptr<Message> send(const Operation& operation, int part) {
    stream.access(false, operation.source, operation.bytes, label(comm, operation), part);
    auto message = std::make_shared<Message>(Message{operation.source, operation.bytes, stream.clock, false, false});
    box(operation).push_back(message);
    return message;
  }

  // Where a send or receive leaves or finds its message.
  std::deque<std::shared_ptr<Message>>& box(const Operation& operation) {
    const bool sends = operation.kind == Operation::kSend;
    const int from = sends ? comm.rank : operation.peer, to = sends ? operation.peer : comm.rank;
    return comm.world->mail[{from, to}];
  }

  // Until the receiver has everything. What was aborted before that never arrives: its memory may be gone.
  void sent(const Operation& operation, const std::shared_ptr<Message>& message) {
    stream.block(lock, "its message to be received",
                 [&] { return message->done || (comm.aborted && !message->copying); });
    auto& waiting = box(operation);
    waiting.erase(std::remove(waiting.begin(), waiting.end(), message), waiting.end());
  }

  bool receive(const Operation& operation, int part) {
    auto& waiting = box(operation);
    if (!block("a message: " + label(comm, operation), [&] { return !waiting.empty(); })) return false;
    auto message = waiting.front();
    waiting.pop_front();
    if (message->bytes != operation.bytes) mismatch(*message, operation);
    Clock learnt = stream.clock;
    join(learnt, message->clock);
    const size_t bytes = std::min(message->bytes, operation.bytes);
    stream.access(true, operation.target, bytes, label(comm, operation), part, &learnt);
    join(known, learnt);
    message->copying = true;
    lock.unlock();
    copy(stream, operation.target, message->data, bytes);
    lock.lock();
    message->copying = false;
    message->done = true;
    machine().notify();
    return true;
  }

  void mismatch(const Message& message, const Operation& operation) {
    const std::string why = label(comm, operation) + " met a send of " + std::to_string(message.bytes) + " bytes";
    machine().misuse(comm.name() + ": " + why);
    for (int rank : {comm.rank, operation.peer}) {
      if (auto member = comm.world->members[rank].lock()) member->error = member->fail(kNcclInvalidUsage, why);
    }
  }

  void put(const Operation& operation, int part) {
    const std::string what = "put " + std::to_string(comm.rank) + "->" + std::to_string(operation.peer);
    // Its signal tells of what came before it, not of the group's later puts.
    tick(stream.clock, stream.task);
    if (operation.window) {
      auto* target = static_cast<char*>(operation.target);
      if (!operation.window->memory.count(operation.peer))
        machine().misuse(comm.name() + ": " + what + " met a window that is gone");
      stream.access(false, operation.source, operation.bytes, what, part);
      stream.access(true, target, operation.bytes, what, part);
      lock.unlock();
      copy(stream, target, operation.source, operation.bytes);
      lock.lock();
    }
    comm.world->signals[{comm.rank, operation.peer}].push_back(stream.clock);
    machine().notify();
  }

  bool wait_signal(const Operation& operation) {
    auto& signals = comm.world->signals[{operation.peer, comm.rank}];
    const auto count = static_cast<size_t>(operation.count);
    // On one host the stream itself looks at the memory that the peer writes: an abort does not end that.
    comm.waiting++;
    const bool held = stream.block(lock, std::to_string(count) + " signals of rank " + std::to_string(operation.peer),
                                   [&] { return signals.size() >= count; });
    comm.waiting--;
    machine().notify();
    if (!held) return false;
    for (size_t i = 0; i < count; i++) {
      join(known, signals.front());
      signals.pop_front();
    }
    return true;
  }

  void all(const std::vector<Operation>& operations) {
    std::vector<std::pair<const Operation*, std::shared_ptr<Message>>> messages;
    int part = 0;
    // Everything leaves before anything is awaited: the operations of a group run side by side.
    for (const auto& operation : operations) {
      part++;
      if (operation.kind == Operation::kSend) messages.emplace_back(&operation, send(operation, part));
      if (operation.kind == Operation::kPut) put(operation, part);
    }
    machine().notify();
    tick(stream.clock, stream.task);
    known = stream.clock;
    part = 0;
    bool whole = true;
    for (const auto& operation : operations) {
      part++;
      if (operation.kind == Operation::kRecv) whole = whole && receive(operation, part);
      if (operation.kind == Operation::kWaitSignal) whole = whole && wait_signal(operation);
    }
    for (const auto& [operation, message] : messages) sent(*operation, message);
    join(stream.clock, known);
  }
};

}  // namespace

void launch(Launch launch) {
  auto comm = launch.communicator;
  const uint64_t turn = comm->launched++;
  auto operations = launch.operations;
  const std::string what = "group of " + std::to_string(operations.size());
  launch.stream->push(what, launch.host, [comm, turn, operations](Stream& stream, Lock& lock) {
    const bool first = stream.block(lock, "earlier operations of its communicator",
                                    [&] { return comm->aborted || comm->finished == turn; });
    if (first && !comm->aborted) {
      join(stream.clock, comm->clock);
      Run{stream, lock, *comm, {}}.all(operations);
      comm->clock = stream.clock;
    }
    comm->finished++;
  });
}

}  // namespace fake

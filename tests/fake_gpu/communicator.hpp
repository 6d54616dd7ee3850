// Communicators of the double: the ranks of one unique id, their mailboxes, windows and errors.
#pragma once
#include <set>
#include <tuple>

#include "machine.hpp"

namespace fake {

// ncclResult_t, as far as the double answers with it.
enum Result : int {
  kNcclSuccess = 0,
  kNcclUnhandledCudaError = 1,
  kNcclInternalError = 3,
  kNcclInvalidArgument = 4,
  kNcclInvalidUsage = 5,
  kNcclRemoteError = 6,
  kNcclInProgress = 7,
};

struct Message {
  const void* data;
  size_t bytes;
  Clock clock;
  bool copying = false, done = false;
};

// One signal that a put or a bare signal left behind: what its sender knew.
using Signal = Clock;

// Sender and receiver.
using Route = std::pair<int, int>;

// The ranks' parts of it, and where their handles go once all have registered.
struct Window {
  std::map<int, std::pair<char*, size_t>> memory;
  std::map<int, void**> handles;
  bool symmetric = true;
};

struct Communicator;

struct World {
  explicit World(int size) : size(size) {}
  const int size;
  // They own their world.
  std::map<int, std::weak_ptr<Communicator>> members;
  std::map<Route, std::deque<std::shared_ptr<Message>>> mail;
  std::map<std::pair<int, int>, std::deque<Signal>> signals;
  std::vector<std::shared_ptr<Window>> windows;
  // Who has begun to connect to whom, and whether to send.
  std::set<std::tuple<int, int, bool>> met;
  bool complete() const { return members.size() == static_cast<size_t>(size); }
};

// One operation of a group.
struct Operation {
  enum Kind { kSend, kRecv, kPut, kWaitSignal } kind;
  const void* source;
  void* target;
  size_t bytes;
  int peer;
  // A put: the window it writes, from this offset; without one it only signals.
  std::shared_ptr<Window> window;
  size_t offset;
  int count;
};

struct Launch {
  std::shared_ptr<Communicator> communicator;
  std::shared_ptr<Stream> stream;
  std::vector<Operation> operations;
  Clock host;
};

struct Communicator {
  std::shared_ptr<World> world;
  bool registering = false;
  int rank = -1;
  int context = -1;
  bool blocking = true, aborted = false;
  int error = kNcclSuccess;
  std::string last_error;
  size_t windows = 0;
  int max_ctas = 0;
  // Operations of one communicator run in the order of their launch, whatever their stream.
  uint64_t launched = 0, finished = 0;
  // Operations that wait for signals, which an abort waits for.
  int waiting = 0;
  Clock clock;
  // Not blocking: launched by the library's own thread, which is over after so many enquiries.
  std::vector<Launch> deferred;
  int enquiries_left = 0;

  // True when every rank has come, to the last registration as well.
  bool ready() const { return world->complete() && !registering; }
  // Success, or the error, remembered as the last one.
  int fail(Result result, std::string why);
  std::string name() const { return "rank " + std::to_string(context); }
};

struct Nccl {
  Table<Communicator> communicators{0x53000000};
  Table<Window> windows{0x54000000};
  std::map<std::string, std::shared_ptr<World>> worlds;
  std::map<void*, size_t> memory;
  std::string last_error;
  int version = 23203, unique_ids = 0;
  // The rank whose windows are refused; -1: none.
  int refuse_windows = -1;
  // How often a communicator that does not block says that its group is still being launched: always, since 2.23.4.
  int enquiries = 1;
  void reset();
};

Nccl& nccl();

// The first group with a peer connects to it: a communicator that blocks waits for the peer's. False: aborted.
bool connect(Lock& lock, const Launch& launch);

// Puts a group on its stream; call with the lock held.
void launch(Launch launch);

// A call that needs every rank returns when all have come, or at once with "in progress". Call with the lock held.
int await(Lock& lock, const std::shared_ptr<Communicator>& comm);

// Adds operations to the open group of the calling thread, or launches them at once; returns a Result. Locks.
int add(void* communicator, void* stream, std::vector<Operation> operations);

// Bytes of an element, by the number of its ncclDataType_t.
size_t size_of(int type);

}  // namespace fake

#include "nccl_puts.hpp"

#include <algorithm>
#include <future>
#include <numeric>
#include <thread>

#include "edges.hpp"

namespace adf {
namespace {

// Copies are fastest between addresses of this alignment.
constexpr size_t kAlignment = 512;
// How long the end of a lane waits for what may never end.
constexpr auto kPatience = std::chrono::seconds(1);

size_t aligned(size_t bytes, size_t alignment = kAlignment) { return (bytes + alignment - 1) / alignment * alignment; }

std::shared_ptr<const Libraries> with_puts(std::shared_ptr<const Libraries> libraries) {
  if (!libraries->puts_missing().empty()) throw ExchangeError(libraries->puts_missing());
  return libraries;
}

// The first of a group's sends from the same buffers, perhaps the message itself.
const Message& first_alike(const Group& group, const Message& message) {
  return *std::find_if(group.messages.begin(), group.messages.end(), [&message](const Message& x) {
    return x.sends && x.bytes == message.bytes && x.buffers == message.buffers;
  });
}

int count(const Group& group, int peer, bool sends) {
  return static_cast<int>(std::count_if(group.messages.begin(), group.messages.end(),
                                        [=](const Message& x) { return x.peer == peer && x.sends == sends; }));
}

}  // namespace

NcclPutsTransport::NcclPutsTransport(std::shared_ptr<const Libraries> libraries, const std::string& unique_id, int rank,
                                     int size, const NcclOptions& options)
    : NcclTransport(with_puts(std::move(libraries)), unique_id, rank, size, options), signals_(size) {}

NcclPutsTransport::~NcclPutsTransport() {
  abort("dropped");
  close();
}

std::vector<size_t> NcclPutsTransport::window(const std::vector<const Group*>& groups) const {
  std::vector<size_t> bytes(size());
  for (const Group* group : groups) {
    for (const Message& x : group->messages) {
      if (!x.sends) bytes[x.peer] += kPlaces * aligned(x.bytes);
      if (x.sends && &first_alike(*group, x) == &x) bytes[rank()] += aligned(x.bytes);
    }
  }
  return bytes;
}

// Every rank lays out its window alike: first what it sends, then what it receives of each rank, in the frozen order.
// So a sender knows its places at a peer from what that peer says of its window.
void NcclPutsTransport::open(const std::vector<const Group*>& groups, const std::vector<std::vector<size_t>>& windows) {
  const size_t ranks = size(), me = rank();
  if (windows.size() != ranks ||
      std::any_of(windows.begin(), windows.end(), [=](const auto& one) { return one.size() != ranks; })) {
    throw ExchangeError("one-sided puts need the windows of all " + std::to_string(ranks) +
                        " ranks: freeze with what `window` gives on each of them");
  }
  auto begin = [&](size_t at, size_t source) {
    size_t sum = windows[at][at];
    for (size_t r = 0; r < source; ++r) sum += r == at ? 0 : windows[at][r];
    return sum;
  };
  size_t largest = 0, own = 0;
  std::vector<size_t> here(ranks), there(ranks);
  for (size_t r = 0; r < ranks; ++r) {
    largest = std::max(largest, std::accumulate(windows[r].begin(), windows[r].end(), size_t{0}));
    here[r] = begin(me, r);
    there[r] = begin(r, me);
  }
  std::unordered_map<const Group*, Plan> plans;
  for (const Group* group : groups) plans[group] = plan(*group, &own, &here, &there);
  for (size_t r = 0; r < ranks; ++r) {
    if (r != me && there[r] != begin(r, me) + windows[r][me]) {
      throw ExchangeError("rank " + std::to_string(me) + " sends rank " + std::to_string(r) + " " +
                          std::to_string(there[r] - begin(r, me)) + " bytes of places, which expects " +
                          std::to_string(windows[r][me]) + "; ranks must freeze the same slots");
    }
  }
  if (largest == 0) return;
  const auto window = make_window(aligned(largest, kNcclWindowAlignment));
  for (auto& [group, one] : plans) {
    one.window = window;
    plans_[group] = std::move(one);
  }
}

// Where the messages of one group lie; `own`, `here` and `there` go on behind them.
NcclPutsTransport::Plan NcclPutsTransport::plan(const Group& group, size_t* own, std::vector<size_t>* here,
                                                std::vector<size_t>* there) const {
  Plan made;
  for (const Message& x : group.messages) {
    size_t& next = x.sends ? (*there)[x.peer] : (*here)[x.peer];
    if (!x.sends) {
      made.arrivals.push_back({&x, next});
    } else if (&first_alike(group, x) == &x) {
      made.puts.push_back({&x, *own, next, true});
      *own += aligned(x.bytes);
    } else {
      const Message* alike = &first_alike(group, x);
      const auto put =
          std::find_if(made.puts.begin(), made.puts.end(), [=](const Put& p) { return p.message == alike; });
      made.puts.push_back({&x, put->from, next, false});
    }
    next += kPlaces * aligned(x.bytes);
  }
  for (int peer = 0; peer < size(); ++peer) {
    const int sent = count(group, peer, true), received = count(group, peer, false);
    if (received > 0) made.sources.push_back({peer, received});
    if (received > 0 && sent == 0) made.credited.push_back(peer);
    if (sent > 0 && received == 0) made.credits.push_back({peer, {}});
  }
  return made;
}

std::shared_ptr<NcclPutsTransport::Window> NcclPutsTransport::make_window(size_t bytes) {
  auto window = std::make_shared<Window>();
  void* memory = nullptr;
  const Entered entered(*libraries_, context());
  check_nccl(*libraries_, libraries_->ncclMemAlloc(&memory, bytes), "ncclMemAlloc");
  window->memory = static_cast<char*>(memory);
  windows_.push_back(window);
  // The others may come to this only after this rank has gone on.
  begin_aside("ncclCommWindowRegister", [lib = libraries_, window, bytes](NcclComm* comm) {
    return lib->ncclCommWindowRegister(*comm, window->memory, bytes, &window->handle, kNcclWindowCollSymmetric);
  });
  return window;
}

void NcclPutsTransport::require(const Window& window) {
  if (window.handle == nullptr) throw ExchangeError("NCCL has registered no window: these devices cannot have one");
}

void NcclPutsTransport::copy(char* target, const char* source, size_t bytes) {
  if (bytes == 0) return;
  cuda(libraries_->cuMemcpyDtoDAsync_v2(reinterpret_cast<uintptr_t>(target), reinterpret_cast<uintptr_t>(source), bytes,
                                        stream()),
       "cuMemcpyDtoDAsync");
}

// Lets the next wait be for a peer's signals up to one of them.
void NcclPutsTransport::need(int peer, uint64_t number) {
  uint64_t& awaited = signals_[peer].awaited;
  if (number <= awaited) return;
  needed_.push_back({static_cast<int>(number - awaited), peer, 0, 0});
  awaited = number;
}

void NcclPutsTransport::wait_for_signals() {
  if (needed_.empty()) return;
  issue("ncclWaitSignal", [this](NcclComm comm) {
    return libraries_->ncclWaitSignal(static_cast<int>(needed_.size()), needed_.data(), comm, stream());
  });
}

void NcclPutsTransport::move(const Group& group, uint64_t epoch) {
  const Libraries& lib = *libraries_;
  const auto found = plans_.find(&group);
  if (found == plans_.end()) throw ExchangeError("slot '" + group.name + "' lies in no window");
  Plan& plan = found->second;
  require(*plan.window);
  char* const memory = plan.window->memory;
  const size_t turn = epoch % group.depth, place = epoch % kPlaces;
  for (const Put& x : plan.puts) {
    if (x.copies) copy(memory + x.from, x.message->buffers[turn], x.message->bytes);
  }
  needed_.clear();
  for (const Credit& x : plan.credits) need(x.peer, x.number[place]);
  ADF_EDGE(Edge::PutAfterCopyOut, wait_for_signals());
  if (!plan.puts.empty()) {
    issue_group([&](NcclComm comm, const auto& note) {
      for (const Put& x : plan.puts) {
        note(lib.ncclPutSignal(memory + x.from, x.message->bytes, kNcclInt8, x.message->peer, plan.window->handle,
                               x.to + place * aligned(x.message->bytes), 0, 0, 0, comm, stream()));
      }
    });
  }
  needed_.clear();
  for (const Source& x : plan.sources) need(x.peer, signals_[x.peer].promised += x.count);
  ADF_EDGE(Edge::CopyAfterPut, wait_for_signals());
  for (const Arrival& x : plan.arrivals) {
    copy(x.message->buffers[turn], memory + x.at + place * aligned(x.message->bytes), x.message->bytes);
  }
  if (!plan.credited.empty()) {
    issue_group([&](NcclComm comm, const auto& note) {
      for (int peer : plan.credited) note(lib.ncclSignal(peer, 0, 0, 0, comm, stream()));
    });
  }
  for (Credit& x : plan.credits) x.number[place] = ++signals_[x.peer].promised;
}

void NcclPutsTransport::detach(Group* group) {
  NcclTransport::detach(group);
  const auto found = plans_.find(group);
  if (found == plans_.end()) return;
  const auto window = found->second.window;
  plans_.erase(found);
  // Once its last group has gone. All that was put into it has been waited for by its post.
  if (std::none_of(plans_.begin(), plans_.end(), [&](const auto& plan) { return plan.second.window == window; })) {
    forget(window);
  }
}

void NcclPutsTransport::forget(const std::shared_ptr<Window>& window) {
  require(*window);
  issue("ncclCommWindowDeregister",
        [&](NcclComm comm) { return libraries_->ncclCommWindowDeregister(comm, window->handle); });
  check_nccl(*libraries_, libraries_->ncclMemFree(window->memory), "ncclMemFree");
  windows_.erase(std::find(windows_.begin(), windows_.end(), window));
}

void NcclPutsTransport::close() {
  if (windows_.empty()) return NcclTransport::close();
  const Entered entered(*libraries_, context());
  const bool whole = !health().broken() && !gone();
  // While others have yet to register, the communicator is left to the call that waits for them.
  if (whole && !settled()) abort("closed while a window was being registered");
  while (whole && !gone() && !windows_.empty()) forget(std::shared_ptr<Window>(windows_.back()));
  NcclTransport::close();
  // What still copies may do so: its memory is left to the end of the process.
  const bool over = windows_.empty() || (!stuck_ && settled() && run_dry());
  for (const auto& window : windows_) {
    if (over) libraries_->ncclMemFree(window->memory);
  }
  windows_.clear();
}

// A stream that waits for a signal looks at memory alone and sees no abort, and NCCL may wait for the stream.
void NcclPutsTransport::end(NcclComm comm) {
  try {
    std::promise<void> ended;
    auto over = ended.get_future();
    std::thread([libraries = libraries_, device = context(), comm, ended = std::move(ended)]() mutable {
      libraries->cuCtxSetCurrent(device);
      libraries->ncclCommAbort(comm);
      ended.set_value();
    }).detach();
    stuck_ = over.wait_for(kPatience) != std::future_status::ready;
  } catch (const std::system_error&) {
    libraries_->ncclCommAbort(comm);
  }
}

}  // namespace adf

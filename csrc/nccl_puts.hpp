// CUDA tensors of one host, one-sided: a rank writes what it sends into its peer's memory, by the copy engine.
//
// NCCL writes from windows into windows only: memory of its own that all ranks register together, one arena for each
// phase. It holds a place for what this rank sends, and for each message that it receives kPlaces places in turn. A
// post copies out of the sent tensors, puts and signals, waits for the puts of its peers, and copies into the tensors
// that receive; so tensors lie where they like, and their hazards are those of send and receive.
//
// Why a put never overwrites what its peer has yet to copy out. The signals of one peer are one counter, so they are
// counted in the order of the slots that the two ranks have in common, which is the same on both.
// 1. A slot that goes both ways: the put of epoch e follows the wait for the peer's put of e - 1, and that put followed
//    the copy out of e - 2 in the peer's lane. Two places are enough, and nothing else is needed.
// 2. One that goes one way: the receiver signals behind its copy, as a credit; the put of e waits for that of e - 2.
// 3. A wait is for signals of this slot's post or of earlier ones, which their sender issues without waiting for
//    anything later: posts in one order on all ranks cannot wait for each other in a circle.
#pragma once
#include <unordered_map>

#include "nccl_transport.hpp"

namespace adf {

class NcclPutsTransport final : public NcclTransport {
 public:
  // As NcclTransport. Raises ExchangeError where NCCL has no puts.
  NcclPutsTransport(std::shared_ptr<const Libraries> libraries, const std::string& unique_id, int rank, int size,
                    const NcclOptions& options);
  ~NcclPutsTransport() override;

  std::vector<size_t> window(const std::vector<const Group*>& groups) const override;
  void open(const std::vector<const Group*>& groups, const std::vector<std::vector<size_t>>& windows) override;
  void detach(Group* group) override;
  void close() override;

 private:
  static constexpr int kPlaces = 2;

  struct Window {
    char* memory = nullptr;
    // There once all ranks have registered their part.
    NcclWindow handle = nullptr;
  };
  struct Put {
    const Message* message;
    // In this rank's window; in the peer's, the first of kPlaces.
    size_t from, to;
    // The first message with these buffers: others send the same copy.
    bool copies;
  };
  struct Arrival {
    const Message* message;
    size_t at;
  };
  // Puts of a peer to count at each post.
  struct Source {
    int peer, count;
  };
  // A peer that only receives: the number of its signal that says that a place is free.
  struct Credit {
    int peer;
    uint64_t number[kPlaces];
  };
  struct Plan {
    std::shared_ptr<Window> window;
    std::vector<Put> puts;
    std::vector<Arrival> arrivals;
    std::vector<Source> sources;
    std::vector<Credit> credits;
    // Peers that only send: they wait for credits of this rank.
    std::vector<int> credited;
  };
  struct Signals {
    // Of all posts so far; of those, how many the lane has waited for.
    uint64_t promised = 0, awaited = 0;
  };

  void move(const Group& group, uint64_t epoch) override;
  void end(NcclComm comm) override;

  Plan plan(const Group& group, size_t* own, std::vector<size_t>* here, std::vector<size_t>* there) const;
  std::shared_ptr<Window> make_window(size_t bytes);
  // Raises ExchangeError unless a window is registered.
  static void require(const Window& window);
  void forget(const std::shared_ptr<Window>& window);
  void copy(char* target, const char* source, size_t bytes);
  void need(int peer, uint64_t number);
  void wait_for_signals();

  // Not even an abort has ended what was under way.
  std::atomic<bool> stuck_{false};
  std::vector<Signals> signals_;
  std::vector<NcclWaitSignalDesc> needed_;
  std::vector<std::shared_ptr<Window>> windows_;
  std::unordered_map<const Group*, Plan> plans_;
};

}  // namespace adf

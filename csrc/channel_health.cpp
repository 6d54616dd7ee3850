// What a channel knows of itself and its peers: counts, the last posts, failures and how they are put into words.
#include <algorithm>
#include <cstdio>

#include "channel.hpp"

namespace adf {
namespace {

// A rank that closes in good order says so through a store; its process may be seen to end a little earlier.
constexpr auto kLeaveGrace = std::chrono::milliseconds(600);

// What a rank posted before it left may still be on its way.
constexpr double kLeftPatienceS = 1;

std::string number(double value) {
  char text[32];
  snprintf(text, sizeof text, "%g", value);
  return text;
}

std::string list(const Transport& transport, const std::vector<int>& ranks) {
  std::string text;
  for (int r : ranks) text += (text.empty() ? "" : ", ") + transport.name(r);
  return text;
}

}  // namespace

void Channel::check() { enter(); }

void Channel::abort(const std::string& reason) {
  if (forked()) return;
  fail(reason);
  told_ = true;
}

void Channel::report(const std::string& reason) {
  if (!forked()) fail(reason);
}

void Channel::leave(const std::string& reason) {
  if (forked()) return;
  if (!transport_->health().fail(transport_->name() + " has left the exchange: " + reason)) {
    return;
  }
  told_ = true;
  transport_->leave(reason);
}

void Channel::mark_left(int rank) {
  if (forked()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  left_.at(rank) = true;
}

std::optional<std::string> Channel::broken() const {
  if (!transport_->health().broken()) return std::nullopt;
  return transport_->health().reason();
}

Statistics Channel::stats() const {
  std::lock_guard<std::mutex> lock(mutex_);
  Statistics found = stats_;
  for (const auto& slot : slots_) {
    if (slot != nullptr && slot->wait_us > 0) found.wait_us_by_slot[slot->name] += slot->wait_us;
  }
  return found;
}

void Channel::clear_stats() {
  std::lock_guard<std::mutex> lock(mutex_);
  stats_ = Statistics();
  for (const auto& slot : slots_) {
    if (slot != nullptr) slot->wait_us = 0;
  }
}

// An epoch whose mark was taken over is over.
State Channel::state(const Posted& posted) const {
  const auto& marks = posted.slot->marks;
  if (marks.empty() || posted.slot->posted - posted.epoch > marks.size()) return State::kDone;
  if (posted.epoch >= posted.slot->submitted) return State::kQueued;
  return transport_->state(*posted.slot, posted.epoch);
}

std::vector<PostRecord> Channel::history() {
  std::lock_guard<std::mutex> lock(mutex_);
  static constexpr const char* kNames[] = {"queued", "running", "done"};
  std::vector<PostRecord> records;
  for (uint64_t i = recorded_ - std::min(recorded_, kHistory); i < recorded_; ++i) {
    const Posted& posted = history_[i % history_.size()];
    std::string name = "unknown";
    try {
      name = kNames[static_cast<int>(state(posted))];
    } catch (const ExchangeError&) {
      // A device that has failed answers no query; what was posted is still worth telling.
    }
    records.push_back(
        {posted.slot->name, posted.slot->phase, posted.epoch, microseconds_since(posted.when) / 1e6, name});
  }
  return records;
}

std::string Channel::place(const Slot& slot, uint64_t epoch) const {
  return transport_->name() + ", slot '" + slot.name + "' (exchange " + std::to_string(epoch) + ")";
}

std::string Channel::unconnected() const {
  return "found no connection in " + number(timeout_s_) +
         " s; another rank never came here, or cannot be reached: see its log, or raise timeout_s";
}

std::string Channel::late(const Slot& slot, uint64_t epoch, double waited_s) const {
  return transport_->name() + " waited for rank " + list(*transport_, transport_->missing(slot, epoch)) + " in slot '" +
         slot.name + "' (exchange " + std::to_string(epoch) + ") and failed: nothing came for " + number(waited_s) +
         " s; that rank hangs or has gone another way: see its log, or raise timeout_s (now " + number(timeout_s_) +
         ")";
}

void Channel::fail(const std::string& reason) {
  if (transport_->health().fail(reason)) transport_->abort(reason);
}

void Channel::look(const std::vector<int>& ended) {
  if (transport_->health().broken()) return;
  std::optional<std::string> reason;
  try {
    transport_->inspect();
    reason = lost_peer(ended);
    if (!reason) reason = standstill();
  } catch (const std::exception& error) {
    reason = transport_->name() + ": " + error.what();
  }
  if (reason) fail(*reason);
}

std::optional<std::string> Channel::lost_peer(const std::vector<int>& ended) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (int rank : ended) {
    if (left_[rank] || transport_->left(rank)) continue;
    if (!ended_since_) ended_since_ = Clock::now();
    if (!transport_->on_host() && Clock::now() - *ended_since_ < kLeaveGrace) continue;
    std::string last = "before any exchange";
    if (recorded_ > 0) {
      const Posted& posted = history_[(recorded_ - 1) % history_.size()];
      last = "last posted: slot '" + posted.slot->name + "' (exchange " + std::to_string(posted.epoch) + ")";
    }
    return transport_->name() + " waited for rank " + transport_->name(rank) + " and failed: its process " +
           std::to_string(pids_[rank]) + " died (" + last + "); see that rank's log and start all ranks again";
  }
  return std::nullopt;
}

// Streams wait for ever without a word, so the watchdog counts: how long the oldest exchange that has begun is not
// over.
std::optional<std::string> Channel::standstill() {
  if (transport_->on_host()) return std::nullopt;
  std::lock_guard<std::mutex> lock(mutex_);
  stands_at_ = std::max(stands_at_, recorded_ - std::min<uint64_t>(recorded_, history_.size()));
  const uint64_t before = stands_at_;
  while (stands_at_ < recorded_ && state(history_[stands_at_ % history_.size()]) == State::kDone) ++stands_at_;
  const bool running = stands_at_ < recorded_ && state(history_[stands_at_ % history_.size()]) == State::kRunning;
  if (!running || stands_at_ != before) stands_since_.reset();
  if (!running) return std::nullopt;
  if (!stands_since_) stands_since_ = Clock::now();
  const double stood = microseconds_since(*stands_since_) / 1e6;
  const Posted& posted = history_[stands_at_ % history_.size()];
  for (int peer : transport_->missing(*posted.slot, posted.epoch)) {
    if (left_[peer] && stood > kLeftPatienceS) {
      return place(*posted.slot, posted.epoch) + " waits for rank " + transport_->name(peer) +
             ", which has left the exchange";
    }
  }
  if (stood < timeout_s_) return std::nullopt;
  return late(*posted.slot, posted.epoch, stood);
}

}  // namespace adf

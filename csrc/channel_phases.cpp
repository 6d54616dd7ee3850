// Phases of a channel: slots in a frozen order, and the memory that their transport shares for them.
#include <algorithm>

#include "channel.hpp"

namespace adf {

std::vector<const Group*> Channel::groups(const std::vector<int>& slots) const {
  std::vector<const Group*> found;
  for (int number : slots) found.push_back(&at(number));
  return found;
}

std::vector<size_t> Channel::window(const std::vector<int>& slots) const { return transport_->window(groups(slots)); }

void Channel::freeze(const std::string& phase, const std::vector<int>& slots,
                     const std::vector<std::vector<size_t>>& windows) {
  enter();
  if (phases_.count(phase) != 0) throw std::invalid_argument("phase '" + phase + "' is frozen already");
  for (auto number = slots.begin(); number != slots.end(); ++number) {
    const Slot& slot = at(*number);
    if (slot.order != nullptr) {
      throw std::invalid_argument("slot '" + slot.name + "' belongs to phase '" + slot.phase + "'");
    }
    if (std::find(slots.begin(), number, *number) != number) {
      throw std::invalid_argument("slot '" + slot.name + "' is twice in phase '" + phase + "'");
    }
  }
  try {
    transport_->open(groups(slots), windows);
  } catch (const ExchangeError& error) {
    fail(transport_->name() + ", phase '" + phase + "': " + error.what());
    raise();
  }
  Phase& order = phases_[phase];
  order.slots = slots;
  for (int number : slots) {
    Slot& slot = at(number);
    slot.phase = phase;
    slot.order = &order;
  }
}

void Channel::release(const std::string& phase) {
  enter();
  const auto found = phases_.find(phase);
  if (found == phases_.end()) throw std::invalid_argument("no phase '" + phase + "' is frozen");
  drain(found->second.slots);
  // A window is taken back only once all ranks have it.
  if (!window(found->second.slots).empty()) settle(transport_->name() + ", phase '" + phase + "'");
  std::lock_guard<std::mutex> lock(mutex_);
  for (int number : found->second.slots) {
    under_way_ -= slots_[number]->marks.size();
    transport_->detach(slots_[number].get());
    slots_[number].reset();
  }
  phases_.erase(found);
}

}  // namespace adf

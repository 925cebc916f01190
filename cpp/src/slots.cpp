#include "slots.hpp"

#include <string>

#include "enat/enat.hpp"

namespace enat {

namespace {

std::uint64_t checked(int count) {
    if (count < 1) throw InputError("expected 1 or more slots, got " + std::to_string(count));
    return static_cast<std::uint64_t>(count);
}

}  // namespace

Slots::Slots(int count) : count_(checked(count)) {}

Slots::Place Slots::take() {
    std::unique_lock lock(mutex_);
    const auto [holder, is_new] = holders_.insert(std::this_thread::get_id());
    if (!is_new) throw InputError("a callback must not ask its pipeline for other pictures: the batch being drawn holds the slot");
    const std::uint64_t ticket = asked_++;
    given_.wait(lock, [&] { return ticket < done_ + count_; });
    return Place(*this);
}

void Slots::give() {
    const std::lock_guard lock(mutex_);
    holders_.erase(std::this_thread::get_id());
    ++done_;
    given_.notify_all();
}

}  // namespace enat

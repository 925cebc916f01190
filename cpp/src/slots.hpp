// How many batches are in flight at once, and whose turn it is.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <set>
#include <thread>

namespace enat {

/// Places for batches. Who waits for one gets it in turn: a thread that draws batch after batch would otherwise take it again before
/// the others wake up.
class Slots {
public:
    /// Throws InputError for less than one.
    explicit Slots(int count);

    /// A place, as long as it lives. Its thread gives it back.
    class Place {
    public:
        explicit Place(Slots& slots) : slots_(slots) {}
        ~Place() { slots_.give(); }
        Place(const Place&) = delete;
        Place& operator=(const Place&) = delete;

    private:
        Slots& slots_;
    };

    /// Waits while all are taken. Throws InputError for a thread that has one already and might wait for itself.
    Place take();

private:
    void give();

    const std::uint64_t count_;
    std::mutex mutex_;
    std::condition_variable given_;
    std::uint64_t asked_ = 0, done_ = 0;  // how many have asked for a place, and given theirs back
    std::set<std::thread::id> holders_;
};

}  // namespace enat

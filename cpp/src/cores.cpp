#include "cores.hpp"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>
#include <string>
#include <system_error>
#include <vector>

namespace enat {

namespace {

namespace fs = std::filesystem;

std::optional<double> read_quota(const fs::path& group) {
    double quota = 0, period = 0;
    std::ifstream both(group / "cpu.max");  // version 2; `max` is no number
    if (!(both >> quota >> period)) {
        std::ifstream first(group / "cpu.cfs_quota_us"), second(group / "cpu.cfs_period_us");
        if (!(first >> quota) || !(second >> period)) return std::nullopt;
    }
    if (!(quota > 0 && period > 0)) return std::nullopt;
    return quota / period;
}

/// Where groups of the controllers of a line of /proc/self/cgroup are mounted, in the order of trying; nothing for lines without `cpu`.
std::vector<fs::path> mounts(const fs::path& root, const std::string& controllers) {
    const fs::path all = root / "sys/fs/cgroup";
    if (controllers.empty()) return {all / "unified", all};
    if (("," + controllers + ",").find(",cpu,") == std::string::npos) return {};
    return {all / controllers, all / "cpu"};
}

}  // namespace

std::optional<double> least_quota(const fs::path& root) {
    std::optional<double> least;
    std::ifstream lines(root / "proc/self/cgroup");
    for (std::string line; std::getline(lines, line);) {
        std::istringstream words(line);
        std::string number, controllers, name;
        if (!std::getline(words, number, ':') || !std::getline(words, controllers, ':') || !std::getline(words, name)) continue;
        for (const fs::path& mount : mounts(root, controllers)) {
            std::error_code ignored;
            if (!fs::is_directory(mount, ignored)) continue;
            // The group, and those around it. In a container it may go by its name outside, and be mounted without it.
            fs::path group = fs::path(name).relative_path();
            while (true) {
                const auto quota = read_quota(mount / group);
                if (quota) least = std::min(least.value_or(*quota), *quota);
                if (group.empty()) break;
                group = group.parent_path();
            }
            break;
        }
    }
    return least;
}

int machine_threads() { return static_cast<int>(std::max(1l, sysconf(_SC_NPROCESSORS_ONLN))); }

int allowed_threads() {
    const int count = machine_threads();
    int allowed = count;
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) allowed = CPU_COUNT(&set);
#endif
    const auto quota = least_quota();
    if (quota) allowed = static_cast<int>(std::min<double>(allowed, std::ceil(*quota)));
    return allowed < count ? allowed : 0;
}

}  // namespace enat

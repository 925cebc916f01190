#include "cores.hpp"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <numeric>
#include <set>
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

int core_count(const std::vector<int>& cpus, const fs::path& root) {
    std::set<std::string> cores;
    for (const int cpu : cpus) {
        std::string siblings;
        std::ifstream file(root / "sys/devices/system/cpu" / ("cpu" + std::to_string(cpu)) / "topology/thread_siblings_list");
        cores.insert(std::getline(file, siblings) ? siblings : "cpu" + std::to_string(cpu));
    }
    return static_cast<int>(cores.size());
}

int machine_cores() {
    std::vector<int> cpus(machine_threads());
    std::iota(cpus.begin(), cpus.end(), 0);
    return core_count(cpus);
}

int allowed_threads() {
    const int count = machine_cores();
    int allowed = count;
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        std::vector<int> cpus;
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
            if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
        }
        allowed = core_count(cpus);
    }
#endif
    const auto quota = least_quota();
    if (quota) allowed = static_cast<int>(std::min<double>(allowed, std::ceil(*quota)));
    return allowed < count ? allowed : 0;
}

}  // namespace enat

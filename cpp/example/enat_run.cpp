// enat-run-cpp: pictures from an engine, in a process that needs no Python.

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "enat/enat.hpp"
#include "write_npy.hpp"
#include "write_png.hpp"

namespace {

constexpr const char* usage = R"(usage: enat-run-cpp --engine DIR --class CLASS [--class CLASS …] --out FILE

  --engine DIR                engine directory
  --class CLASS               number, name, or all; may be repeated. #7 is always number 7
  --out FILE                  .png: the pictures on one sheet; .npy: the tokens, int64 [N, grid, grid]
  --num N                     pictures a class (1)
  --seed N                    picture i has seed N + i; without it, one is drawn and printed
  --steps N                   sampling steps, 1 to the number of tokens; default: the engine's
  --guidance X                scale of the classifier-free guidance, 0 for none; default: the engine's
  --mask-temperature X        randomness of which tokens are revealed; default: the engine's
  --sampling-temperature X    randomness of the tokens; default: the engine's
  --batch-size N              pictures drawn at once (8)
  --columns N                 of the sheet; default: a row of up to 8, else about square
  --device DEVICE             cpu or cuda:N (cpu)
  --provider PROVIDER         cpu, cuda or tensorrt; default: by the device
  --threads N                 CPU threads; default: one for each core that the process may use
  --verify                    check the hashes of files over 64 MiB too
  --list-classes              show the engine's classes and end
  -h, --help                  show this and end
)";

struct Arguments {
    std::filesystem::path engine, out;
    std::vector<std::string> classes;
    enat::Options options;
    enat::Settings settings;
    std::size_t columns = 0;
    bool list_classes = false, help = false;
};

/// A whole text as a number; anything else throws.
template <typename Number>
Number parse(const std::string& option, const std::string& text, Number (*convert)(const std::string&, std::size_t*)) {
    try {
        std::size_t used = 0;
        const Number number = convert(text, &used);
        // std::stoull takes "-1" for a very large number.
        const bool negative = std::is_unsigned_v<Number> && text.find('-') != std::string::npos;
        if (used == text.size() && !negative) return number;
    } catch (const std::out_of_range&) {
        throw enat::InputError(option + ": " + text + " is too " + (text[text.find_first_not_of(' ')] == '-' ? "small" : "large") + " a number");
    } catch (const std::logic_error&) {  // none at all
    }
    throw enat::InputError("expected a number for " + option + ", got '" + text + "'");
}

int whole(const std::string& option, const std::string& text) {
    return parse<int>(option, text, [](const std::string& t, std::size_t* used) { return std::stoi(t, used); });
}

std::int64_t large(const std::string& option, const std::string& text) {
    return parse<long long>(option, text, [](const std::string& t, std::size_t* used) { return std::stoll(t, used); });
}

int at_least_one(const std::string& option, const std::string& text) {
    const int number = whole(option, text);
    if (number < 1) throw enat::InputError("expected 1 or more for " + option + ", got " + text);
    return number;
}

double real(const std::string& option, const std::string& text) {
    return parse<double>(option, text, [](const std::string& t, std::size_t* used) {
        char* end = nullptr;
        const double number = std::strtod(t.c_str(), &end);  // std::stod refuses what is next to 0
        *used = static_cast<std::size_t>(end - t.c_str());
        if (*used == 0) throw std::invalid_argument(t);
        return number;
    });
}

std::uint64_t unsigned_number(const std::string& option, const std::string& text) {
    return parse<unsigned long long>(option, text, [](const std::string& t, std::size_t* used) { return std::stoull(t, used); });
}

Arguments parse_arguments(const std::vector<std::string>& words) {
    Arguments result;
    const std::map<std::string, std::function<void()>> flags = {
        {"--verify", [&] { result.options.verify = true; }},
        {"--list-classes", [&] { result.list_classes = true; }},
        {"--help", [&] { result.help = true; }},
        {"-h", [&] { result.help = true; }},
    };
    std::string option;
    const std::map<std::string, std::function<void(const std::string&)>> options = {
        {"--engine", [&](const std::string& text) { result.engine = text; }},
        {"--class", [&](const std::string& text) { result.classes.push_back(text); }},
        {"--out", [&](const std::string& text) { result.out = text; }},
        {"--num", [&](const std::string& text) { result.settings.num = whole(option, text); }},
        {"--seed", [&](const std::string& text) { result.settings.seed = unsigned_number(option, text); }},
        {"--steps", [&](const std::string& text) { result.settings.steps = large(option, text); }},
        {"--guidance", [&](const std::string& text) { result.settings.guidance = real(option, text); }},
        {"--mask-temperature", [&](const std::string& text) { result.settings.mask_temperature = real(option, text); }},
        {"--sampling-temperature", [&](const std::string& text) { result.settings.sampling_temperature = real(option, text); }},
        {"--batch-size", [&](const std::string& text) { result.settings.batch_size = whole(option, text); }},
        {"--columns", [&](const std::string& text) { result.columns = static_cast<std::size_t>(at_least_one(option, text)); }},
        {"--device", [&](const std::string& text) { result.options.device = text; }},
        {"--provider", [&](const std::string& text) { result.options.provider = text; }},
        {"--threads", [&](const std::string& text) { result.options.threads = at_least_one(option, text); }},
    };
    for (std::size_t i = 0; i < words.size(); ++i) {
        option = words[i];
        if (const std::size_t equals = option.find('='); option.rfind("--", 0) == 0 && equals != std::string::npos) {
            const auto entry = options.find(option = words[i].substr(0, equals));
            if (entry == options.end()) throw enat::InputError("unknown argument '" + words[i] + "'; -h shows what there is");
            entry->second(words[i].substr(equals + 1));
        } else if (const auto flag = flags.find(option); flag != flags.end()) {
            flag->second();
        } else if (const auto entry = options.find(option); entry == options.end()) {
            throw enat::InputError("unknown argument '" + option + "'; -h shows what there is");
        } else if (++i == words.size()) {
            throw enat::InputError("expected a value after " + option);
        } else {
            entry->second(words[i]);
        }
    }
    return result;
}

/// On one line of a terminal: control characters are shown as '?'.
std::string printable(std::string text) {
    std::replace_if(text.begin(), text.end(), [](unsigned char letter) { return letter < ' ' || letter == 0x7F; }, '?');
    return text;
}

std::string lower(std::string text) {
    std::transform(text.begin(), text.end(), text.begin(), [](unsigned char letter) { return letter < 0x80 ? std::tolower(letter) : letter; });
    return text;
}

/// The classes that the words name; `all` unless a class is called so.
std::vector<enat::Class> parse_classes(const enat::Pipeline& pipeline, const std::vector<std::string>& words) {
    std::vector<enat::Class> result;
    for (const std::string& word : words) {
        try {
            result.emplace_back(pipeline.class_index(word));
        } catch (const enat::InputError&) {
            if (lower(word) != "all") throw;
            for (std::int64_t i = 0; i < pipeline.model().num_classes; ++i) result.emplace_back(i);
        }
    }
    return result;
}

void list_classes(const enat::Pipeline& pipeline) {
    const enat::Model& model = pipeline.model();
    for (std::int64_t i = 0; i < model.num_classes; ++i) {
        std::cout << i;
        if (!model.class_names.empty()) std::cout << '\t' << printable(model.class_names[static_cast<std::size_t>(i)]);
        std::cout << '\n';
    }
}

/// A file beside the one that is asked for, which takes its place when it is whole.
class PartialFile {
public:
    explicit PartialFile(const std::filesystem::path& target) : target_(target), partial_(target) {
        std::random_device random;  // processes of several containers may have the same number
        partial_.replace_filename(".enat-run-cpp." + std::to_string(random()) + "." + std::to_string(random()) + ".partial");
        std::error_code error;
        if (std::filesystem::is_directory(target, error)) throw enat::InputError(target.string() + ": is a folder; expected a file to write");
        if (error == std::errc::filename_too_long) throw enat::InputError(target.string() + ": cannot be written: " + error.message());
        errno = 0;
        if (!std::ofstream(partial_)) throw enat::InputError(target.string() + ": cannot be written: " + std::strerror(errno));
        std::filesystem::remove(partial_);  // an interrupt while pictures are drawn finds nothing to leave behind
    }
    PartialFile(const PartialFile&) = delete;
    PartialFile& operator=(const PartialFile&) = delete;
    ~PartialFile() {
        std::error_code ignored;
        std::filesystem::remove(partial_, ignored);
    }

    /// Calls `write` with its path and puts the file in place.
    template <typename Write>
    void write(Write write) const {
        try {
            write(partial_);
            std::filesystem::rename(partial_, target_);
        } catch (const enat::Error& error) {
            throw enat::Error(target_.string() + ": cannot be written: " + error.what());
        } catch (const std::filesystem::filesystem_error& error) {
            throw enat::Error(target_.string() + ": cannot be written: " + error.code().message());
        }
    }

private:
    std::filesystem::path target_, partial_;
};

void run(const Arguments& arguments) {
    if (arguments.engine.empty()) throw enat::InputError("expected --engine with an engine directory; -h shows all options");
    const std::string ending = arguments.out.extension().string();
    if (!arguments.list_classes && ending != ".png" && ending != ".npy") {
        throw enat::InputError("expected --out with a file that ends in .png or .npy, got '" + arguments.out.string() + "'");
    }
    const enat::Pipeline pipeline(arguments.engine, arguments.options);
    if (arguments.list_classes) {
        list_classes(pipeline);
        return;
    }
    const auto classes = parse_classes(pipeline, arguments.classes);
    const std::size_t count = classes.size() * static_cast<std::size_t>(std::max(arguments.settings.num, 1));
    const PartialFile file(arguments.out);
    enat::Tokens tokens;
    if (ending == ".png") {
        const auto square = static_cast<std::size_t>(std::ceil(std::sqrt(static_cast<double>(count))));
        const std::size_t columns = arguments.columns > 0 ? arguments.columns : count <= 8 ? count : square;
        if (count > 0) check_sheet(count, columns, static_cast<std::size_t>(pipeline.model().image_size.value_or(1)));
        const enat::Images images = pipeline.generate(classes, arguments.settings);
        file.write([&](const auto& path) { write_png(path, images, columns); });
        tokens = images.tokens;
    } else {
        tokens = pipeline.generate_tokens(classes, arguments.settings);
        file.write([&](const auto& path) { write_npy(path, tokens); });
    }
    if (!arguments.settings.seed) std::cerr << "seed " << tokens.seeds[0] << '\n';
}

int fail(const std::string& message, int code) {
    std::cerr << "Error: " << printable(message) << '\n';
    return code;
}

}  // namespace

int main(int count, char** words) {
    try {
        const Arguments arguments = parse_arguments({words + 1, words + count});
        if (arguments.help) {
            std::cout << usage;
        } else {
            run(arguments);
        }
        if (!std::cout.flush()) throw enat::Error(std::string("stdout cannot be written: ") + std::strerror(errno));
        return 0;
    } catch (const enat::InputError& error) {
        return fail(error.what(), 2);
    } catch (const enat::EngineError& error) {
        return fail(error.what(), 2);
    } catch (const std::bad_alloc&) {
        return fail("not enough memory", 1);
    } catch (const std::exception& error) {
        return fail(error.what(), 1);
    }
}

#include "classes.hpp"

#include <algorithm>
#include <string>
#include <vector>

#include "messages.hpp"

namespace enat {

namespace {

/// Without the blanks around it, in lower case. ASCII alone: other letters are compared as they are.
std::string folded(const std::string& text) {
    constexpr const char* blanks = " \t\n\r\f\v";
    const auto first = text.find_first_not_of(blanks);
    if (first == std::string::npos) return "";
    std::string result = text.substr(first, text.find_last_not_of(blanks) - first + 1);
    for (char& letter : result) {
        if (letter >= 'A' && letter <= 'Z') letter = static_cast<char>(letter - 'A' + 'a');
    }
    return result;
}

std::vector<std::int64_t> by_name(const Model& model, const std::string& wanted) {
    std::vector<std::int64_t> result;
    for (std::size_t i = 0; i < model.class_names.size(); ++i) {
        if (folded(model.class_names[i]) == folded(wanted)) result.push_back(static_cast<std::int64_t>(i));
    }
    return result;
}

std::int64_t in_range(const Model& model, std::int64_t number, const std::string& shown) {
    if (number < 0 || number >= model.num_classes) {
        throw InputError("expected a class of 0 to " + std::to_string(model.num_classes - 1) + ", got " + shown);
    }
    return number;
}

}  // namespace

std::int64_t class_index(const Model& model, const Class& wanted) {
    if (const auto* number = std::get_if<std::int64_t>(&wanted)) return in_range(model, *number, std::to_string(*number));
    const std::string& word = std::get<std::string>(wanted);
    const std::string name = "'" + one_line(word, 80) + "'";
    const std::vector<std::int64_t> found = by_name(model, word);
    if (found.size() == 1) return found[0];
    if (found.size() > 1) {
        std::string numbers;
        for (const std::int64_t number : found) numbers += (numbers.empty() ? "" : ", ") + std::to_string(number);
        throw InputError("class " + name + " is ambiguous: numbers " + numbers + " are called so; give the number");
    }
    const std::string digits = word.substr(word.rfind('#', 0) == 0 ? 1 : 0);
    if (digits.empty() || digits.find_first_not_of("0123456789") != std::string::npos) {
        throw InputError("unknown class " + name + (model.class_names.empty() ? ": this engine's classes have no names" : "") +
                         "; expected " + (model.class_names.empty() ? "" : "a name or ") + "a number of 0 to " +
                         std::to_string(model.num_classes - 1));
    }
    const auto start = std::min(digits.find_first_not_of('0'), digits.size() - 1);
    const std::string significant = digits.substr(start);
    return in_range(model, significant.size() > 18 ? -1 : std::stoll(significant), one_line(digits, 80));
}

}  // namespace enat

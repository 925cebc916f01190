// use-pipeline ENGINE: the C++ interface from the outside, in one thread and in several. Ends with 0 where all holds.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "enat/enat.hpp"

namespace {

void expect(bool holds, const char* what, int line) {
    if (holds) return;
    std::cerr << "line " << line << ": " << what << '\n';
    std::exit(1);
}
#define EXPECT(condition) expect(condition, #condition, __LINE__)

/// Whether a call throws this, with a text in its message.
template <typename Expected, typename Call>
bool throws(Call call, const std::string& text) {
    try {
        call();
    } catch (const Expected& error) {
        return std::string(error.what()).find(text) != std::string::npos;
    }
    return false;
}

enat::Settings with_seed(std::uint64_t seed) {
    enat::Settings settings;
    settings.seed = seed;
    return settings;
}

void test_requests(const enat::Pipeline& pipeline) {
    enat::Settings settings = with_seed(~std::uint64_t{0});  // the seeds go round: 2⁶⁴ − 1, 0, 1, 2
    settings.num = 2;
    const enat::Images images = pipeline.generate({"R", 7}, settings);
    EXPECT(images.count == 4 && images.tokens.count == 4 && images.tokens.grid == 8);
    EXPECT(images.pixels.size() == 4 * images.height * images.width * 3);
    EXPECT((images.tokens.seeds == std::vector<std::uint64_t>{~std::uint64_t{0}, 0, 1, 2}));
    EXPECT(pipeline.decode(images.tokens).pixels == images.pixels);
    EXPECT(pipeline.decode(images.tokens, 1).pixels == images.pixels);
    EXPECT(std::string(enat::version()) == ENAT_VERSION);

    // The same whatever they are batched with, and by their own seeds.
    settings.batch_size = 3;
    EXPECT(pipeline.generate({"R", 7}, settings).pixels == images.pixels);
    enat::Settings own;
    own.seeds = {1};
    const enat::Tokens third = pipeline.generate_tokens({7}, own);
    EXPECT(std::equal(third.values.begin(), third.values.end(), images.tokens[2]));

    // At random without a seed, which is told.
    const enat::Images random = pipeline.generate({"R"}), again = pipeline.generate({"R"});
    EXPECT(random.tokens.seeds != again.tokens.seeds);
    EXPECT(pipeline.generate({"R"}, with_seed(random.tokens.seeds[0])).pixels == random.pixels);
}

void test_callbacks(const enat::Pipeline& pipeline) {
    enat::Settings settings = with_seed(3);
    settings.num = 3;
    settings.batch_size = 2;
    settings.steps = 4;
    const enat::Images expected = pipeline.generate({1}, settings);
    std::vector<std::size_t> seen;
    enat::Images last;
    settings.callback = [&](std::size_t step, std::size_t steps, const enat::Preview& preview) {
        EXPECT(steps == 8);
        seen.push_back(step);
        const auto masked = preview.masked();
        last = preview.images();
        EXPECT(masked.size() == last.count * 64 && last.count == (step < 4 ? 2u : 1u));
        EXPECT((std::count(masked.begin(), masked.end(), 1) == 0) == (step % 4 == 3));
        return false;
    };
    EXPECT(pipeline.generate({1}, settings).pixels == expected.pixels);
    EXPECT((seen == std::vector<std::size_t>{0, 1, 2, 3, 4, 5, 6, 7}));
    EXPECT(std::equal(last.pixels.begin(), last.pixels.end(), expected[2]));  // the last preview is the last batch's picture

    settings.callback = [](std::size_t step, std::size_t, const enat::Preview&) { return step == 5; };
    EXPECT(throws<enat::Stopped>([&] { pipeline.generate({1}, settings); }, "stopped after step 6 of 8"));
    settings.callback = [](std::size_t, std::size_t, const enat::Preview&) -> bool { throw std::out_of_range("the callback's own"); };
    EXPECT(throws<std::out_of_range>([&] { pipeline.generate({1}, settings); }, "the callback's own"));
}

void test_refusals(const enat::Pipeline& pipeline, const std::string& engine) {
    const auto refused = [&](const std::vector<enat::Class>& classes, void (*change)(enat::Settings&), const std::string& text) {
        enat::Settings settings;
        change(settings);
        return throws<enat::InputError>([&] { pipeline.generate(classes, settings); }, text);
    };
    const auto nothing = [](enat::Settings&) {};
    EXPECT(refused({}, nothing, "at least one class"));
    EXPECT(refused({36}, nothing, "a class of 0 to 35, got 36"));
    EXPECT(refused({-1}, nothing, "got -1"));
    EXPECT(refused({"none"}, nothing, "unknown class 'none'"));
    EXPECT(refused({"#99999999999999999999"}, nothing, "got 99999999999999999999"));
    EXPECT(refused({1}, [](enat::Settings& s) { s.num = 0; }, "1 or more images"));
    EXPECT(refused({1}, [](enat::Settings& s) { s.batch_size = 0; }, "batch size of 1 or more"));
    EXPECT(refused({1}, [](enat::Settings& s) { s.steps = 0; }, "expected 1 to 64 steps, got 0"));
    EXPECT(refused({1}, [](enat::Settings& s) { s.steps = 65; }, "expected 1 to 64 steps, got 65"));
    EXPECT(refused({1}, [](enat::Settings& s) { s.guidance = -1; }, "guidance of 0 to 1e6"));
    EXPECT(refused({1}, [](enat::Settings& s) { s.mask_temperature = NAN; }, "mask temperature of 0 to 1e6"));
    EXPECT(refused({1}, [](enat::Settings& s) { s.sampling_temperature = HUGE_VAL; }, "sampling temperature of 0 to 1e6"));
    EXPECT(refused({1}, [](enat::Settings& s) { s.seeds = {1, 2}; }, "one seed for each of 1 images, got 2"));
    EXPECT(refused({1}, [](enat::Settings& s) { s.seeds = {1}, s.seed = 1; }, "got both"));
    enat::Tokens tokens = pipeline.generate_tokens({1});
    tokens.values[5] = 512;
    EXPECT(throws<enat::InputError>([&] { pipeline.decode(tokens); }, "tokens of 0 to 511"));
    tokens.count = 2;
    EXPECT(throws<enat::InputError>([&] { pipeline.decode(tokens); }, "expected tokens of shape [N, 8, 8]"));
    EXPECT(throws<enat::InputError>([&] { pipeline.decode({}); }, "expected tokens of shape"));
    enat::Tokens many;
    many.count = std::size_t{1} << 58;  // 8 · 8 times as many are 0
    many.grid = 8;
    EXPECT(throws<enat::InputError>([&] { pipeline.decode(many); }, "expected tokens of shape"));
    EXPECT(throws<enat::InputError>([&] { pipeline.decode(tokens, 0); }, "batch size of 1 or more, got 0"));

    const auto opens = [&](enat::Options options) { enat::Pipeline{engine, options}; };
    enat::Options options;
    options.device = "gpu";
    EXPECT(throws<enat::InputError>([&] { opens(options); }, "unknown device 'gpu'"));
    options = {};
    options.provider = "tensorrt";
    EXPECT(throws<enat::InputError>([&] { opens(options); }, "got the device cpu"));
    options = {};
    options.threads = -1;
    EXPECT(throws<enat::InputError>([&] { opens(options); }, "threads, as this machine's CPU has"));
    options.threads = 100000;
    EXPECT(throws<enat::InputError>([&] { opens(options); }, "got 100000"));
    options = {};
    options.slots = 0;
    EXPECT(throws<enat::InputError>([&] { opens(options); }, "expected 1 or more slots, got 0"));
    EXPECT(throws<enat::EngineError>([&] { enat::Pipeline("/nowhere"); }, "/nowhere"));
}

void test_threads(const enat::Pipeline& pipeline) {
    constexpr std::size_t threads = 8, rounds = 4;
    std::vector<enat::Images> expected;
    for (std::size_t i = 0; i < threads; ++i) expected.push_back(pipeline.generate({static_cast<std::int64_t>(i)}, with_seed(i)));
    std::vector<int> equal(threads), refused(threads);
    std::vector<std::thread> running;
    for (std::size_t i = 0; i < threads; ++i) {
        running.emplace_back([&, i] {
            for (std::size_t round = 0; round < rounds; ++round) {
                equal[i] += pipeline.generate({static_cast<std::int64_t>(i)}, with_seed(i)).pixels == expected[i].pixels;
                refused[i] += throws<enat::InputError>([&] { pipeline.generate({99}); }, "got 99");
            }
        });
    }
    for (std::thread& thread : running) thread.join();
    EXPECT(equal == std::vector<int>(threads, rounds));
    EXPECT(refused == std::vector<int>(threads, rounds));
}

/// A long run lets others in between its batches, and a callback is told that it would wait for itself.
void test_turns(const enat::Pipeline& pipeline) {
    const auto expected = pipeline.generate({3}, with_seed(5)).pixels;
    std::atomic<bool> begun = false, other_done = false;
    std::size_t after = 0;  // steps of the long run when the other one was done
    bool equal = false;
    std::thread other([&] {
        while (!begun) std::this_thread::yield();
        equal = pipeline.generate({3}, with_seed(5)).pixels == expected;
        other_done = true;
    });
    enat::Settings settings = with_seed(0);
    settings.num = 1000;
    settings.batch_size = 1;
    settings.callback = [&](std::size_t step, std::size_t, const enat::Preview&) {
        begun = true;
        after = step;
        return other_done.load();
    };
    EXPECT(throws<enat::Stopped>([&] { pipeline.generate_tokens({1}, settings); }, "stopped after step"));
    other.join();
    EXPECT(equal && after < 800);

    settings.callback = [&](std::size_t, std::size_t, const enat::Preview&) { return pipeline.generate({1}).count > 0; };
    EXPECT(throws<enat::InputError>([&] { pipeline.generate({1}, settings); }, "must not ask its pipeline"));
}

/// Pipelines come and go in several threads at once, and move.
void test_lives(const std::string& engine, const enat::Pipeline& pipeline) {
    const auto expected = pipeline.generate({2}, with_seed(9)).pixels;
    std::vector<int> equal(3);
    std::vector<std::thread> running;
    for (int& result : equal) {
        running.emplace_back([&] {
            enat::Pipeline first{engine};
            const enat::Pipeline second = std::move(first);
            result = second.generate({2}, with_seed(9)).pixels == expected;
        });
    }
    for (std::thread& thread : running) thread.join();
    EXPECT(equal == std::vector<int>(3, 1));
}

}  // namespace

int main(int count, char** words) {
    EXPECT(count == 2);
    const enat::Pipeline pipeline{words[1]};
    EXPECT(pipeline.has_images() && pipeline.model().length() == 64 && pipeline.sampling().steps == 8);
    EXPECT(pipeline.class_index("r") == 17 && pipeline.class_index(" R ") == 17);
    EXPECT(pipeline.class_index("7") == 33 && pipeline.class_index("#7") == 7 && pipeline.class_index("17") == 17);
    test_requests(pipeline);
    test_callbacks(pipeline);
    test_refusals(pipeline, words[1]);
    test_threads(pipeline);
    test_turns(pipeline);
    enat::Options options;
    options.slots = 3;
    test_threads(enat::Pipeline{words[1], options});
    test_lives(words[1], pipeline);
    std::cout << "all holds\n";
}

/* use-c-interface ENGINE OUT: the C interface from C. Writes the tokens of classes 3 and 4 with the seed 11 to OUT, int64. */

#include <enat/enat.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPECT(condition)                                                                   \
    do {                                                                                    \
        if (!(condition)) {                                                                 \
            fprintf(stderr, "line %d: %s (%s)\n", __LINE__, #condition, enat_last_error()); \
            exit(1);                                                                        \
        }                                                                                   \
    } while (0)

/* Whether the last error has a text in it. */
static int said(const char* text) { return strstr(enat_last_error(), text) != NULL; }

struct watch {
    size_t steps, stop_after;
    uint8_t first_pixel;
};

static int on_step(size_t step, size_t steps, const enat_preview* preview, void* user) {
    struct watch* watch = user;
    enat_images images;
    EXPECT(steps == 8 && step == watch->steps);
    EXPECT(enat_preview_images(preview, &images) == ENAT_OK);
    EXPECT(images.count == 2 && images.height == 64 && images.pixels != NULL && images.seeds == NULL);
    watch->first_pixel = images.pixels[0];
    enat_free_images(&images);
    watch->steps++;
    return watch->steps == watch->stop_after;
}

int main(int count, char** words) {
    EXPECT(count == 3);
    enat_pipeline* pipeline = NULL;
    EXPECT(enat_open("/no\xff\nwhere\xc3\xa9", NULL, &pipeline) == ENAT_ENGINE_ERROR && said("/no??where\xc3\xa9: not an engine"));
    EXPECT(enat_open("/nowhere", NULL, &pipeline) == ENAT_ENGINE_ERROR && pipeline == NULL && said("/nowhere: not an engine directory"));
    EXPECT(enat_open(NULL, NULL, &pipeline) == ENAT_INPUT_ERROR && said("engine, got NULL"));
    EXPECT(enat_open(words[1], NULL, NULL) == ENAT_INPUT_ERROR && said("pipeline, got NULL"));
    enat_options options = {"cuda:0", "cuda", 0, 0, 0};
    enat_status status = enat_open(words[1], &options, &pipeline);
    EXPECT(status == ENAT_BACKEND_ERROR && said("cuda:0")); /* the tests' ONNX Runtime has no CUDA */
    options = (enat_options){NULL, NULL, 2, 1, 2};
    EXPECT(enat_open(words[1], &options, &pipeline) == ENAT_OK);

    enat_info info;
    EXPECT(enat_get_info(pipeline, &info) == ENAT_OK);
    EXPECT(info.grid == 8 && info.codes == 512 && info.num_classes == 36 && info.steps == 8 && info.guidance == 4.0);
    EXPECT(info.has_images == 1 && info.has_class_names == 1);
    EXPECT(strcmp(enat_class_name(pipeline, 3), "D") == 0 && enat_class_name(pipeline, 36) == NULL &&
           enat_class_name(pipeline, -1) == NULL);
    int64_t number = 0;
    EXPECT(enat_class_index(pipeline, "d", &number) == ENAT_OK && number == 3);
    EXPECT(enat_class_index(pipeline, "none", &number) == ENAT_INPUT_ERROR && said("unknown class 'none'"));

    const int64_t classes[] = {3, 4}, wrong[] = {36};
    const uint64_t seed = 11, seeds[] = {11, 12};
    enat_settings settings = enat_default_settings();
    settings.seeds = &seed;
    settings.seed_count = 1;
    enat_images images, other;
    EXPECT(enat_generate(pipeline, classes, 2, &settings, &images) == ENAT_OK);
    EXPECT(images.count == 2 && images.height == 64 && images.width == 64 && images.grid == 8 && images.seeds[1] == 12);
    FILE* file = fopen(words[2], "wb");
    EXPECT(file != NULL && fwrite(images.tokens, sizeof(int64_t), 128, file) == 128 && fclose(file) == 0);

    EXPECT(enat_decode(pipeline, images.tokens, (size_t)1 << 58, &other) == ENAT_INPUT_ERROR && strstr(enat_last_error(), "got 288230"));
    EXPECT(strncmp(enat_version(), "0.", 2) == 0);
    EXPECT(enat_decode(pipeline, images.tokens, 2, &other) == ENAT_OK && memcmp(other.pixels, images.pixels, 2 * 64 * 64 * 3) == 0);
    enat_free_images(&other);
    settings.seeds = seeds;
    settings.seed_count = 2;
    settings.tokens_only = 1;
    EXPECT(enat_generate(pipeline, classes, 2, &settings, &other) == ENAT_OK && other.pixels == NULL);
    EXPECT(memcmp(other.tokens, images.tokens, 128 * sizeof(int64_t)) == 0 && other.seeds[0] == 11);
    enat_free_images(&other);
    EXPECT(enat_generate(pipeline, classes, 2, NULL, &other) == ENAT_OK && other.seeds[1] == other.seeds[0] + 1);
    enat_free_images(&other);

    struct watch watch = {0, 100, 0};
    settings.tokens_only = 0;
    settings.callback = on_step;
    settings.user = &watch;
    EXPECT(enat_generate(pipeline, classes, 2, &settings, &other) == ENAT_OK && watch.steps == 8);
    EXPECT(watch.first_pixel == other.pixels[0]);
    enat_free_images(&other);
    watch = (struct watch){0, 3, 0};
    EXPECT(enat_generate(pipeline, classes, 2, &settings, &other) == ENAT_STOPPED && said("stopped after step 3 of 8"));
    EXPECT(other.owner == NULL && other.pixels == NULL);
    enat_free_images(&other);

    settings = enat_default_settings();
    settings.steps = 65;
    EXPECT(enat_generate(pipeline, classes, 2, &settings, &other) == ENAT_INPUT_ERROR && said("got 65"));
    settings = enat_default_settings();
    settings.guidance = -1;
    EXPECT(enat_generate(pipeline, classes, 2, &settings, &other) == ENAT_INPUT_ERROR && said("guidance"));
    settings = enat_default_settings();
    settings.seeds = seeds;
    EXPECT(enat_generate(pipeline, classes, 2, &settings, &other) == ENAT_INPUT_ERROR && said("seed_count"));
    EXPECT(enat_generate(pipeline, wrong, 1, NULL, &other) == ENAT_INPUT_ERROR && said("got 36"));
    EXPECT(enat_generate(pipeline, NULL, 0, NULL, &other) == ENAT_INPUT_ERROR && said("at least one class"));
    EXPECT(enat_generate(pipeline, NULL, 2, NULL, &other) == ENAT_INPUT_ERROR && said("classes, got NULL"));
    EXPECT(enat_generate(pipeline, classes, (size_t)1 << 61, NULL, &other) == ENAT_INPUT_ERROR && said("number of classes, got 230584"));
    settings.seed_count = (size_t)1 << 61;
    EXPECT(enat_generate(pipeline, classes, 2, &settings, &other) == ENAT_INPUT_ERROR && said("number of seeds, got 230584"));
    EXPECT(enat_generate(NULL, classes, 2, NULL, &other) == ENAT_INPUT_ERROR && said("pipeline, got NULL"));
    EXPECT(enat_generate(pipeline, classes, 2, NULL, NULL) == ENAT_INPUT_ERROR && said("images, got NULL"));

    enat_free_images(&images);
    enat_free_images(&images);
    enat_free_images(NULL);
    enat_close(pipeline);
    enat_close(NULL);
    puts("all holds");
    return 0;
}

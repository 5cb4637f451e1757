/// distseg_predict: segments one volume with a model of `distseg export`, without Python.

#include <ATen/Parallel.h>
#include <getopt.h>
#include <unistd.h>

#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <iostream>

#include "error.h"
#include "segmenter.h"
#include "volume.h"

namespace fs = std::filesystem;

namespace {

constexpr const char* kUsage = "usage: distseg_predict MODEL.pt IN OUT [--batch N] [--device cpu|cuda] [--threads N]\n"
                               "       [--intensity auto|hu|grey] [--pixel-mm Y,X]\n";
constexpr const char* kHelp = R"(
Segments IN with a model that `distseg export` wrote, and writes its labels to OUT.

  IN         .nii or .nii.gz in any axis order, in HU or in grey 0..255 of [-1250, 250] HU; .npy: int16 HU (Z, Y, X)
  OUT        uint8 labels: NIfTI with the volume's geometry, or .npy
  --batch      slices in one forward pass (default 4)
  --device     where to compute (default cpu)
  --threads    of the CPU (default: as many as libtorch takes)
  --intensity  of a NIfTI file: hu, grey or auto: by its values (default)
  --pixel-mm   of the pixels of a .npy, down and across, where the model takes it
)";

struct Arguments {
  fs::path model, input, output;
  int64_t batch_size = 4;
  at::Device device = at::kCPU;
  int64_t threads = 0;  // 0: libtorch decides
  Intensity intensity = Intensity::kAuto;
  std::optional<PixelMm> pixel_mm;
};

[[noreturn]] void stop_on_wrong_use(const std::string& what) {
  std::cerr << kUsage << "distseg_predict: error: " << what << '\n';
  std::exit(2);
}

int64_t parse_count(const char* option, const std::string& text) {
  int32_t count = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), count);
  if (error != std::errc() || *end != '\0' || count < 1) {
    stop_on_wrong_use(std::string(option) + ": got '" + text + "'; must be a whole number of at least 1");
  }
  return count;
}

at::Device parse_device(const std::string& text) {
  if (text != "cpu" && text != "cuda") stop_on_wrong_use("--device: got '" + text + "'; must be cpu or cuda");
  return at::Device(text);
}

Intensity parse_intensity(const std::string& text) {
  if (text == "auto") return Intensity::kAuto;
  if (text == "hu") return Intensity::kHu;
  if (text == "grey") return Intensity::kGrey;
  stop_on_wrong_use("--intensity: got '" + text + "'; must be auto, hu or grey");
}

PixelMm parse_pixel_mm(const std::string& text) {
  PixelMm mm{};
  int used = 0;
  const int found = std::sscanf(text.c_str(), "%lf,%lf%n", &mm[0], &mm[1], &used);
  if (found != 2 || used != static_cast<int>(text.size()) || !(mm[0] > 0 && mm[1] > 0 && mm[0] < 1e6 && mm[1] < 1e6)) {
    stop_on_wrong_use("--pixel-mm: got '" + text + "'; must be two sizes above 0 with a comma, such as 0.7,0.7");
  }
  return mm;
}

Arguments parse_arguments(int argc, char** argv) {
  static const option kOptions[] = {{"batch", required_argument, nullptr, 'b'},
                                    {"device", required_argument, nullptr, 'd'},
                                    {"threads", required_argument, nullptr, 't'},
                                    {"intensity", required_argument, nullptr, 'i'},
                                    {"pixel-mm", required_argument, nullptr, 'p'},
                                    {"help", no_argument, nullptr, 'h'},
                                    {}};
  Arguments arguments;
  opterr = 0;  // wrong words are named below
  for (int found; (found = getopt_long(argc, argv, "h", kOptions, nullptr)) != -1;) {
    switch (found) {
      case 'b': arguments.batch_size = parse_count("--batch", optarg); break;
      case 'd': arguments.device = parse_device(optarg); break;
      case 't': arguments.threads = parse_count("--threads", optarg); break;
      case 'i': arguments.intensity = parse_intensity(optarg); break;
      case 'p': arguments.pixel_mm = parse_pixel_mm(optarg); break;
      case 'h': std::cout << kUsage << kHelp; std::exit(0);
      default: stop_on_wrong_use(std::string("got '") + argv[optind - 1] + "'; no such option, or it lacks its value");
    }
  }
  if (argc - optind != 3) stop_on_wrong_use("got " + std::to_string(argc - optind) + " names; MODEL.pt, IN and OUT are needed");
  arguments.model = argv[optind];
  arguments.input = argv[optind + 1];
  arguments.output = argv[optind + 2];
  return arguments;
}

double elapsed_s() {
  static auto last = std::chrono::steady_clock::now();
  const auto now = std::chrono::steady_clock::now();
  const std::chrono::duration<double> elapsed = now - last;
  last = now;
  return elapsed.count();
}

void print_description(const Segmenter& segmenter) {
  for (const auto& [name, value] : segmenter.description().items()) std::cout << "  " << name << ": " << value << '\n';
}

/// Rules for whole volumes are `distseg predict`'s; a mask without them must not pass for one with them.
void name_postprocessing(const Segmenter& segmenter) {
  const auto rules = segmenter.description().value("postprocessing", nlohmann::ordered_json());
  if (!rules.is_null()) std::cout << "not applied: post-processing of whole volumes, " << rules << '\n';
}

/// How much of each region was found: a region is a union of labels.
void print_regions(const Segmenter& segmenter, const at::Tensor& mask_ZYX, std::optional<double> ml) {
  for (const auto& [region, labels] : segmenter.description().at("regions").items()) {
    int64_t voxels = 0;
    for (const int64_t label : labels) voxels += mask_ZYX.eq(label).sum().item<int64_t>();
    std::cout << region << ": " << voxels << " voxels";
    if (ml) std::cout << ", " << static_cast<double>(voxels) * *ml << " ml";
    std::cout << '\n';
  }
}

void show_progress(int64_t done, int64_t of) {
  if (isatty(STDERR_FILENO)) std::cerr << '\r' << done << " of " << of << " slices" << (done == of ? "\n" : "") << std::flush;
}

void predict(const Arguments& arguments) {
  check_output(arguments.input, arguments.output);
  if (arguments.threads) at::set_num_threads(static_cast<int>(arguments.threads));
  elapsed_s();
  const Volume volume = read_volume(arguments.input, arguments.intensity);
  const int64_t n = volume.hu_ZYX.size(0);
  std::cout << arguments.input.string() << ": " << volume.hu_ZYX.sizes() << " slices, rows, columns, intensity "
            << volume.intensity << " (read in " << elapsed_s() << " s)\n";
  Segmenter segmenter(arguments.model, arguments.device);
  std::cout << arguments.model.string() << " (loaded in " << elapsed_s() << " s)\n";
  print_description(segmenter);
  name_postprocessing(segmenter);
  const std::optional<PixelMm> own_mm = pixel_mm(volume);
  const at::Tensor mask_ZYX =
      segmenter.segment(volume.hu_ZYX, arguments.batch_size, [n](int64_t done) { show_progress(done, n); },
                        own_mm ? own_mm : arguments.pixel_mm);
  const double segmented_s = elapsed_s();
  write_mask(arguments.output, mask_ZYX, volume);
  std::cout << arguments.output.string() << ": segmented in " << segmented_s << " s, "
            << static_cast<double>(n) / segmented_s << " slices/s (written in " << elapsed_s() << " s)\n";
  print_regions(segmenter, mask_ZYX, voxel_ml(volume));
}

/// The first line of what a library said; libtorch adds its stack.
std::string first_line(const char* text) { return {text, std::strcspn(text, "\n")}; }

}  // namespace

int main(int argc, char** argv) {
  const Arguments arguments = parse_arguments(argc, argv);
  try {
    predict(arguments);
    return 0;
  } catch (const std::bad_alloc&) {
    std::cerr << "error: not enough memory for " << arguments.input.string() << '\n';
  } catch (const c10::Error& error) {
    std::cerr << "error: libtorch: " << first_line(error.what_without_backtrace()) << '\n';
  } catch (const std::exception& error) {
    std::cerr << "error: " << first_line(error.what()) << '\n';
  }
  return 1;
}

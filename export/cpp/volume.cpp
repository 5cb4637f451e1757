#include "volume.h"

#include <ATen/ops/bincount.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <cstring>
#include <sstream>

#include "error.h"
#include "npy.h"

namespace fs = std::filesystem;

namespace {

// As in distseg/data/volume.py.
constexpr int64_t kAirHu = -1024;
constexpr double kLowestHu = -32768, kHighestHu = 32767;  // what int16 holds
constexpr double kSomeBelowHu = -200, kRangeAboveHu = 300;  // what tells HU: lung or air, and tissue beside it
constexpr double kGreyLowHu = -1250, kGreyHighHu = 250;
constexpr int64_t kMostLabels = 12;  // values of what is a label map, not grey; as in distseg/serving/prediction.py
constexpr double kLeastResampled = -64, kMostResampled = 320;  // how far a spline may leave grey 0..255

Volume read_npy_volume(const fs::path& path) {
  const HuArray array = read_npy(path);
  if (array.shape.size() != 3) {
    throw UserError("volume " + path.string() + ": got an array of rank " + std::to_string(array.shape.size()) +
                    "; it must have slices, rows and columns; reshape it");
  }
  const at::Tensor hu_ZYX = at::empty(array.shape, at::kShort);
  std::memcpy(hu_ZYX.data_ptr(), array.values.data(), hu_ZYX.nbytes());
  return {hu_ZYX};
}

/// The rules of `hounsfield` in distseg/data/volume.py; tests/serving/test_cpp.py feeds both the same files.
Volume hounsfield(const at::Tensor& values_ZYX, const NiftiHeader& header, const fs::path& path, Intensity intensity) {
  const double low = values_ZYX.min().to(at::kDouble).item<double>();
  const double high = values_ZYX.max().to(at::kDouble).item<double>();
  if (!std::isfinite(low) || !std::isfinite(high)) {
    throw UserError("volume " + path.string() + ": holds NaN or infinite values; HU are finite; mend or leave it out");
  }
  std::ostringstream got;
  got << "volume " << path.string() << ": got values " << low << ".." << high;
  if (intensity == Intensity::kGrey && (low < kLeastResampled || high > kMostResampled)) {
    throw UserError(got.str() + ", declared grey; grey is 0..255; use --intensity hu or auto");
  }
  const bool is_flat = low == high || (low >= 0 && high <= 1);
  if (is_flat && intensity != Intensity::kHu) {
    throw UserError(got.str() + ", scaled to 0..1 or without contrast; HU or grey 0..255 are needed; take the volume of "
                                "before it was scaled");
  }
  const bool is_grey = low >= 0 && high <= 255 && !is_flat;
  if (is_grey && intensity == Intensity::kHu) {
    throw UserError(got.str() + ", declared hu; they look like grey; use --intensity grey or auto");
  }
  if (is_grey && intensity == Intensity::kAuto) {
    const at::Tensor whole = values_ZYX.to(at::kByte);
    const int64_t held = at::bincount(whole.flatten()).count_nonzero().item<int64_t>();
    if (held <= kMostLabels && whole.to(values_ZYX.scalar_type()).equal(values_ZYX)) {
      throw UserError(got.str() + ", " + std::to_string(held) + " of them only; a label map, by its look, and no CT; give the "
                                  "CT, or say --intensity grey");
    }
  }
  if (is_grey || intensity == Intensity::kGrey) {
    const at::Tensor grey = values_ZYX.to(at::kFloat).clamp(0, 255);  // 255 is more than int8 holds
    const at::Tensor hu = grey.div(255).mul(kGreyHighHu - kGreyLowHu).add(kGreyLowHu);
    return {hu.round().to(at::kShort), "grey_-1250_250", header};
  }
  const bool is_hu = (low < kSomeBelowHu && high - low > kRangeAboveHu) || intensity == Intensity::kHu;
  if (!is_hu || low < kLowestHu || high > kHighestHu) {
    throw UserError(got.str() + "; neither HU (values below -200, a range above 300, nothing beyond 32767) nor grey 0..255; "
                                "set slope and intercept, or say --intensity hu or grey");
  }
  return {values_ZYX.round().to(at::kShort).clamp_min(kAirHu), "hu", header};
}

}  // namespace

Volume read_volume(const fs::path& path, Intensity intensity) {
  if (path.extension() == ".npy") return read_npy_volume(path);
  if (!is_nifti(path)) {
    throw UserError("volume: got " + path.string() + "; its name must end in .nii.gz, .nii or .npy; convert it");
  }
  const NiftiVolume file = read_nifti(path);
  return hounsfield(axis_order(file.header).to_ZYX(file.values_KJI), file.header, path, intensity);
}

void check_output(const fs::path& input, const fs::path& output) {
  std::error_code absent;
  if (fs::equivalent(input, output, absent)) {
    throw UserError("output: got " + output.string() + ", which is the input; give another name");
  }
  const bool is_npy = input.extension() == ".npy";
  if (is_npy ? output.extension() != ".npy" : !is_nifti(output)) {
    throw UserError("output: got " + output.string() + "; the mask's name must end in " +
                    (is_npy ? ".npy" : ".nii.gz or .nii") + " as the volume's; rename it");
  }
}

void write_mask(const fs::path& path, const at::Tensor& mask_ZYX, const Volume& like) {
  if (like.header) {
    write_nifti(path, axis_order(*like.header).to_KJI(mask_ZYX), *like.header);
    return;
  }
  const at::Tensor mask = mask_ZYX.contiguous();
  write_npy(path, "|u1", mask.sizes(), {static_cast<const char*>(mask.data_ptr()), mask.nbytes()});
}

std::optional<std::array<double, 2>> pixel_mm(const Volume& volume) {
  if (!volume.header) return std::nullopt;
  return pixel_mm(*volume.header);
}

std::optional<double> voxel_ml(const Volume& volume) {
  if (!volume.header) return std::nullopt;
  return voxel_ml(*volume.header);
}

/// NIfTI volumes in and masks out, on niftilib's headers and files.
///
/// Two of its functions are not used (version 3.0.1): nifti_image_load turns NaN into 0 and overlooks the checksum of a gzip
/// file, nifti_image_write says nothing of a full disk and drops the transforms whose code is 0.
/// K, J and I are the file's third, second and first axis, in whatever direction they run.
#pragma once

#include <ATen/core/Tensor.h>
#include <nifti2_io.h>

#include <array>
#include <filesystem>
#include <memory>
#include <variant>

struct NiftiHeader {
  std::variant<nifti_1_header, nifti_2_header> stored;  // in this machine's byte order
  std::shared_ptr<const nifti_image> parsed;            // without voxels
};

struct NiftiVolume {
  NiftiHeader header;
  at::Tensor values_KJI;  // real numbers, slope and intercept applied
};

/// How the file's axes become slices as distseg sees them: x to the patient's Left, y to Posterior, z to Superior.
struct AxisOrder {
  at::DimVector source;    // of Z, Y, X: which of K, J, I it is
  at::DimVector reversed;  // which of Z, Y, X run the other way in the file

  at::Tensor to_ZYX(const at::Tensor& values_KJI) const;
  at::Tensor to_KJI(const at::Tensor& values_ZYX) const;
};

/// Whether the name says so, in any case.
bool is_nifti(const std::filesystem::path& path);

/// Reads a three-dimensional file; further axes of length 1 are dropped.
/// @throws UserError no such file, not NIfTI, truncated, not three-dimensional, too large, in metres, or without a usable affine, also
/// one whose axes are not at right angles.
NiftiVolume read_nifti(const std::filesystem::path& path);

/// Writes uint8 labels in the place of another file's voxels: the same version, shape and geometry, field by field.
/// @throws UserError the file cannot be written.
void write_nifti(const std::filesystem::path& path, const at::Tensor& mask_KJI, const NiftiHeader& like);

AxisOrder axis_order(const NiftiHeader& header);

/// Of a slice's pixels, down and across, rounded to 1e-6 mm as distseg does.
std::array<double, 2> pixel_mm(const NiftiHeader& header);

/// Of one voxel.
double voxel_ml(const NiftiHeader& header);

"""Segments a NIfTI volume on a Triton server with nothing but tritonclient, numpy and nibabel; a program of your own.

python export/triton/client.py localhost:8001 volume.nii.gz mask.nii.gz

The volume is in HU. `distseg predict --server` does the same with DICOM, grey volumes, post-processing, and every check.
"""

import json
import sys

import nibabel
import numpy as np
import tritonclient.grpc as triton

address, source, target = sys.argv[1:]
client = triton.InferenceServerClient(address)
config = client.get_model_config("distseg", as_json=True)["config"]
described = json.loads(config["parameters"]["distseg.json"]["string_value"])  # what model.json says
neighbours = described["input"]["shape"][1] // 2
batch = config["max_batch_size"]

# The model wants rows to posterior, columns to the patient's left, slices from feet to head: (Z, Y, X) of LPS.
image = nibabel.load(source)
to_lps = nibabel.orientations.ornt_transform(
    nibabel.orientations.io_orientation(image.affine), nibabel.orientations.axcodes2ornt("LPS")
)
hu_XYZ = nibabel.orientations.apply_orientation(np.asanyarray(image.dataobj), to_lps)
if hu_XYZ.min() >= 0:
    sys.exit(f"{source}: got no value below 0; it must be in HU; distseg predict --server takes grey 0..255 too")
hu_ZYX = np.clip(np.rint(hu_XYZ), -32768, 32767).astype(np.int16).transpose(2, 1, 0)

masks = []
for start in range(0, len(hu_ZYX), batch):
    z_B1 = np.arange(start, min(start + batch, len(hu_ZYX)))[:, None]
    around = np.clip(z_B1 + np.arange(-neighbours, neighbours + 1), 0, len(hu_ZYX) - 1)  # end slices repeat
    hu_BCHW = np.ascontiguousarray(hu_ZYX[around])
    hu = triton.InferInput("HU", hu_BCHW.shape, "INT16")
    hu.set_data_from_numpy(hu_BCHW)
    answer = client.infer("distseg", [hu], outputs=[triton.InferRequestedOutput("MASK")])
    masks.append(answer.as_numpy("MASK")[:, 0])
mask_XYZ = np.concatenate(masks).transpose(2, 1, 0)

back = nibabel.orientations.ornt_transform(
    nibabel.orientations.axcodes2ornt("LPS"), nibabel.orientations.io_orientation(image.affine)
)
mask = nibabel.orientations.apply_orientation(mask_XYZ, back)
nibabel.save(nibabel.Nifti1Image(mask, image.affine), target)
print(f"{target}: " + ", ".join(f"{name} {int((mask == n).sum())} voxels" for name, n in described["labels"].items()))

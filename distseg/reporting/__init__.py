"""The pages of `distseg report`: what a run or a study has left, read, drawn and written as one HTML file each."""

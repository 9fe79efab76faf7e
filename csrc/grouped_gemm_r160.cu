// One family per file, so that they compile side by side.
#include "grouped_gemm.cuh"

template void expertd::launch_family<expertd::FamilyR160>(expertd::Output, const expertd::GemmMaps&,
                                                          const expertd::GemmParams&, int,
                                                          const expertd::LaunchConfig&);

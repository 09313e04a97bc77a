// All kernels for the instruction set TRAMONTANE_ISA; compiled once for each.
#include "attention.h"
#include "elementwise.h"
#include "experts.h"
#include "finite.h"
#include "linear.h"
#include "router.h"
#include "sampling.h"
#include "training.h"

namespace tramontane {
namespace TRAMONTANE_ISA {

#define TRAMONTANE_TEXT_OF(name) #name
#define TRAMONTANE_TEXT(name) TRAMONTANE_TEXT_OF(name)

extern const KernelTable kernel_table;
const KernelTable kernel_table = {TRAMONTANE_TEXT(TRAMONTANE_ISA),
                                  linear,
                                  experts,
                                  norm,
                                  norm_grad,
                                  swiglu,
                                  swiglu_grad,
                                  rotate,
                                  store_in_cache,
                                  attention,
                                  router,
                                  head,
                                  sample,
                                  is_finite};

}  // namespace TRAMONTANE_ISA
}  // namespace tramontane

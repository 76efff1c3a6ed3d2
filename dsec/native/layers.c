/* Layers: EROFS images that Python opened, each mounted once, for all sandboxes that have it below their root.
 *
 * The mount is backed by the file itself (no loop device) and holds it; the descriptor is closed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include "spawner.h"

static uint8_t mounted[LAYERS_COUNT_MAX];

int is_mounted(uint32_t layer) {
    return layer < LAYERS_COUNT_MAX && mounted[layer];
}

static const char *mount_image(const char *target, int image) {
    char source[64];
    snprintf(source, sizeof source, "/base/proc/self/fd/%d", image);
    if (mkdir(target, 0755) < 0 && errno != EEXIST) return "make a layer's directory";
    if (mount(source, target, "erofs", MS_RDONLY | MS_NOSUID | MS_NODEV, NULL) < 0) return "mount a layer";
    return NULL;
}

int on_mount(struct reader *in, int image) {
    uint32_t layer = take_u32(in);
    if (in->bad || layer >= LAYERS_COUNT_MAX || mounted[layer] || image < 0) return -1;
    char target[LAYER_PATH_BYTES_MAX];
    name_layer(layer, target);
    const char *step = mount_image(target, image);
    if (step) return report_failure(MSG_MOUNT_FAILED, layer, step, errno);
    mounted[layer] = 1;
    return report(MSG_MOUNTED, layer);
}

int on_unmount(struct reader *in) {
    uint32_t layer = take_u32(in);
    if (in->bad || !is_mounted(layer)) return -1;
    char target[LAYER_PATH_BYTES_MAX];
    name_layer(layer, target);
    umount2(target, MNT_DETACH); /* sandboxes have copies of the mount, and the last of those lets go of the file */
    rmdir(target);
    mounted[layer] = 0;
    return report(MSG_UNMOUNTED, layer);
}

int report_layers(void) {
    for (uint32_t layer = 0; layer < LAYERS_COUNT_MAX; layer++)
        if (mounted[layer] && report(MSG_MOUNTED, layer) < 0) return -1;
    return 0;
}

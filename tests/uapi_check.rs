//! Holds the hand-written numbers and layouts of `server/wire` against the system's own headers, as bindgen
//! reads them: `cargo test --features uapi-check --test uapi_check` (needs libclang-dev, linux-libc-dev).

#[cfg(not(feature = "uapi-check"))]
#[test]
#[ignore = "needs the feature uapi-check (and libclang): cargo test --features uapi-check --test uapi_check"]
fn numbers_and_layouts_are_those_of_the_headers() {
    panic!("built without the feature uapi-check: nothing was compared");
}

#[cfg(feature = "uapi-check")]
mod checked {
    use std::collections::BTreeMap;

    use vmgmt_wire::{errno, pci, uapi};

    #[allow(
        non_upper_case_globals,
        non_camel_case_types,
        non_snake_case,
        dead_code,
        unsafe_code,
        unsafe_op_in_unsafe_fn,
        clippy::all
    )]
    mod system {
        include!(concat!(env!("OUT_DIR"), "/uapi.rs"));
    }

    fn compare(ours: &[(&str, u64)]) {
        let system: BTreeMap<&str, u64> = system::CONSTANTS.iter().copied().collect();
        let wrong: Vec<String> = ours
            .iter()
            .filter_map(|(name, value)| match system.get(name) {
                Some(expected) if expected == value => None,
                Some(expected) => Some(format!("{name} is {value:#x}, in the headers {expected:#x}")),
                None => Some(format!("{name} is not in the headers")),
            })
            .collect();
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    #[test]
    #[should_panic(expected = "VFIO_PCI_NUM_IRQS is 0x6, in the headers 0x5")]
    fn a_wrong_number_is_found() {
        compare(&[("VFIO_PCI_NUM_IRQS", 6)]);
    }

    #[test]
    #[should_panic(expected = "VFIO_NO_SUCH_NAME is not in the headers")]
    fn a_wrong_name_is_found() {
        compare(&[("VFIO_NO_SUCH_NAME", 0)]);
    }

    #[test]
    fn vfio_numbers() {
        assert!(uapi::CONSTANTS.len() >= 45);
        compare(uapi::CONSTANTS);
    }

    #[test]
    fn pci_numbers() {
        assert!(pci::CONSTANTS.len() > 100);
        compare(pci::CONSTANTS);
    }

    #[test]
    fn error_numbers() {
        assert!(errno::CONSTANTS.len() >= 20);
        compare(errno::CONSTANTS);
    }

    /// The same size, and each field at the same offset with the same size.
    macro_rules! same_layout {
        ($ours:ty, $theirs:ty, { $($our_field:ident = $their_field:ident),* $(,)? }) => {{
            $(
                assert_eq!(
                    (std::mem::offset_of!($ours, $our_field), field_bytes(|all: &$ours| &all.$our_field)),
                    (std::mem::offset_of!($theirs, $their_field), field_bytes(|all: &$theirs| &all.$their_field)),
                    concat!(stringify!($theirs), ".", stringify!($their_field)),
                );
            )*
        }};
    }

    fn field_bytes<All, Field>(_: impl Fn(&All) -> &Field) -> usize {
        size_of::<Field>()
    }

    #[test]
    fn layouts() {
        use system::*;
        same_layout!(uapi::RegionInfoBody, vfio_region_info,
            { argsz = argsz, flags = flags, index = index, cap_offset = cap_offset, size = size, offset = offset });
        assert_eq!(size_of::<uapi::RegionInfoBody>(), size_of::<vfio_region_info>());
        same_layout!(uapi::IrqInfoBody, vfio_irq_info, { argsz = argsz, flags = flags, index = index, count = count });
        assert_eq!(size_of::<uapi::IrqInfoBody>(), size_of::<vfio_irq_info>());
        same_layout!(uapi::IrqSetHead, vfio_irq_set,
            { argsz = argsz, flags = flags, index = index, start = start, count = count });
        assert_eq!(
            size_of::<uapi::IrqSetHead>(),
            std::mem::offset_of!(vfio_irq_set, data)
        );
        // vfio-user stops where the kernel's structure got longer.
        same_layout!(uapi::DeviceInfoBody, vfio_device_info,
            { argsz = argsz, flags = flags, num_regions = num_regions, num_irqs = num_irqs });
        assert_eq!(
            size_of::<uapi::DeviceInfoBody>(),
            std::mem::offset_of!(vfio_device_info, cap_offset)
        );
        // vfio-user has the file offset where the kernel has the address of the process.
        same_layout!(uapi::DmaMapBody, vfio_iommu_type1_dma_map,
            { argsz = argsz, flags = flags, offset = vaddr, iova = iova, size = size });
        assert_eq!(
            size_of::<uapi::DmaMapBody>(),
            size_of::<vfio_iommu_type1_dma_map>()
        );
        same_layout!(uapi::DmaUnmapBody, vfio_iommu_type1_dma_unmap,
            { argsz = argsz, flags = flags, iova = iova, size = size });
        assert_eq!(
            size_of::<uapi::DmaUnmapBody>(),
            std::mem::offset_of!(vfio_iommu_type1_dma_unmap, data)
        );
        same_layout!(uapi::InfoCapHeader, vfio_info_cap_header, { id = id, version = version, next = next });
        assert_eq!(
            size_of::<uapi::InfoCapHeader>(),
            size_of::<vfio_info_cap_header>()
        );
        same_layout!(uapi::SparseMmapHead, vfio_region_info_cap_sparse_mmap,
            { header = header, nr_areas = nr_areas, reserved = reserved });
        assert_eq!(
            size_of::<uapi::SparseMmapHead>(),
            std::mem::offset_of!(vfio_region_info_cap_sparse_mmap, areas)
        );
        same_layout!(uapi::SparseMmapArea, vfio_region_sparse_mmap_area, { offset = offset, size = size });
        assert_eq!(
            size_of::<uapi::SparseMmapArea>(),
            size_of::<vfio_region_sparse_mmap_area>()
        );
        same_layout!(uapi::DeviceFeatureHead, vfio_device_feature, { argsz = argsz, flags = flags });
        assert_eq!(
            size_of::<uapi::DeviceFeatureHead>(),
            std::mem::offset_of!(vfio_device_feature, data)
        );
    }
}
